// Keys and values of a sequence: where they lie, what a row sees of them, how accepted rows move.
//
// Of a layer and head, keys lie [slots / LANES][dim / STEP][LANES][STEP] and values
// [slots / STEP][dim][STEP]: as kernels.h reads weights. Fast: attention is then the same inner
// products as a linear layer's, with nothing to transpose. Exact: a key's slot never matters;
// VisibleKeys numbers the keys that a row sees in order of position, wherever they lie.
#pragma once
#include <cstring>
#include <vector>

#include "kernels.h"
#include "structs.h"
#include "threads.h"

constexpr int KEY_VECTORS = 4;                  // vectors of keys that are scored together
constexpr int KEY_BLOCK = KEY_VECTORS * LANES;  // keys of them; a cache holds whole blocks

// Keys and values of one layer and key/value head, numbered through: layer * kv_heads + head.
template <class T> struct HeadCache {
  T *keys, *values;
  int dim;

  HeadCache(const Model& m, const Cache& cache, int64_t number) : dim(m.dim) {
    const int64_t at = number * cache.slots * m.dim;
    keys = (T*)cache.keys + at;
    values = (T*)cache.values + at;
  }

  // The first STEP elements of a slot's key; the next ones lie LANES * STEP behind.
  T* key(int64_t slot) const {
    return keys + slot / LANES * LANES * dim + slot % LANES * STEP<T>;
  }

  // The first element of a slot's value; the next ones lie STEP behind.
  T* value(int64_t slot) const {
    return values + slot / STEP<T> * STEP<T> * dim + slot % STEP<T>;
  }

  // key, value [dim]: of the row that gets this slot.
  void write(int64_t slot, const T* new_key, const T* new_value) const {
    T* to_key = key(slot);
    for (int d = 0; d < dim; d += STEP<T>)
      memcpy(to_key + d * LANES, new_key + d, STEP<T> * sizeof(T));
    T* to_value = value(slot);
    for (int d = 0; d < dim; d++) to_value[d * STEP<T>] = new_value[d];
  }

  void move(int64_t from, int64_t to) const {
    const T* old_key = key(from);
    T* to_key = key(to);
    for (int d = 0; d < dim; d += STEP<T>)
      memcpy(to_key + d * LANES, old_key + d * LANES, STEP<T> * sizeof(T));
    const T* old_value = value(from);
    T* to_value = value(to);
    for (int d = 0; d < dim; d++) to_value[d * STEP<T>] = old_value[d * STEP<T>];
  }
};

// The keys that one row sees, in order of position: slots 0 .. in_place - 1, then `others`.
struct VisibleKeys {
  int count;
  int in_place;
  const int* others;  // [count - in_place] slots, ascending; of a chain, none
  int end;            // one more than the last slot

  // own: the slots of the pass's own rows that it sees, ascending; length: committed tokens.
  VisibleKeys(const int* own, int owned, int length)
      : count(length + owned), in_place(length), others(own), end(own[owned - 1] + 1) {
    while (in_place < count && *others == in_place) {
      in_place++;
      others++;
    }
  }
};

// What each row of a pass sees. The pass's arguments have been checked (interface.cpp).
class Visibility {
 public:
  int64_t width = 0;  // the most slots that a sequence has

  Visibility(const Cache* caches, const Pass& pass) : lengths(pass.lengths), begin(pass.rows + 1) {
    for (int64_t r = 0; r < pass.rows; r++) {
      width = std::max(width, caches[pass.sequences[r]].slots);
      for (int64_t j = 0; j < pass.rows; j++)
        if (pass.within[r * pass.rows + j]) own.push_back(pass.slots[j]);
      begin[r + 1] = own.size();
    }
  }

  VisibleKeys of(int row) const {
    return {own.data() + begin[row], begin[row + 1] - begin[row], int(lengths[row])};
  }

 private:
  const int64_t* lengths;
  std::vector<int> own;    // slots, ascending for each row
  std::vector<int> begin;  // [rows + 1]: where a row's begin
};

// Keep the rows at `from` [count] slots as the slots length, length + 1, ..: the accepted walk of a
// tree, made contiguous.
template <class T>
static void move_rows(const Model& m, const Cache& cache, int64_t length, const int64_t* from,
                      int64_t count) {
  parallel_for(m.threads, m.layers * m.kv_heads, [&](int64_t number) {
    const HeadCache<T> head(m, cache, number);
    for (int64_t j = 0; j < count; j++)
      if (from[j] != length + j) head.move(from[j], length + j);
  });
}
