// Linear layers: a block of outputs for all rows, the SAT adapter's update, a thread's share.
//
// Fast: threads share the blocks of outputs, so each weight is read once, by one thread, which
// fetches what it reads next meanwhile. Exact: the rows are cut into tiles of any size, and none of
// an output's sum depends on the cut. The adapter acts on SAT rows only, so no other row's bits
// can depend on it: that is why drafting leaves the model's own answers alone.
#pragma once
#include <vector>

#include "int8.h"
#include "kernels.h"
#include "low_bits.h"
#include "structs.h"
#include "threads.h"

// Rows that a linear layer reads, also in 8 bits where its weights are.
template <class T> struct Rows {
  const Input<T>* values;  // [rows, size]
  int64_t size;
  Int8Rows int8;
  Rows from(int64_t row) const { return {values + row * size, size, int8.from(row)}; }
};

// y [rows, BLOCK] = x . w for one block of outputs, as multiply_grouped_tile8() has it.
template <int PARTS, class Scale>
static void multiply_grouped_block8(const Int8Rows& x, int64_t size, int rows, const char* w,
                                    const char* next, float* y) {
  const int64_t bytes = (size + size / INT8_GROUP * PARTS * sizeof(Scale)) * BLOCK;
  in_tiles<INT8_TILE>(rows, next, bytes, [&](int first, auto count, Prefetch ahead) {
    multiply_grouped_tile8<decltype(count)::value, PARTS, Scale>(x.from(first), size, w, ahead,
                                                                 y + first * BLOCK);
  });
}

// y [rows, BLOCK] = x . w for block b of outputs. next: what is read after it.
template <class T>
static void multiply_block(const Rows<T>& x, int rows, const Matrix& w, int64_t b,
                           const char* next, float* y) {
  const char* weight = w.block(b);
  if (w.form == PLAIN) {
    const int64_t bytes = x.size * BLOCK * sizeof(T);
    in_tiles<TILE, FEW_ROWS>(rows, next, bytes, [&](int first, auto count, Prefetch ahead) {
      multiply_tile<T, decltype(count)::value>(x.values + first * x.size, x.size, (const T*)weight,
                                               ahead, y + first * BLOCK);
    });
  } else if (w.form == INT8) {
    const float* scale = (const float*)(w.scale + b * w.stride);
    in_tiles<INT8_TILE>(rows, next, x.size * BLOCK, [&](int first, auto count, Prefetch ahead) {
      multiply_tile8<decltype(count)::value>(x.int8.from(first), x.size,
                                             (const uint8_t*)weight, scale, ahead,
                                             y + first * BLOCK);
    });
  } else if (w.form == BITS8) {
    multiply_grouped_block8<1, f16>(x.int8, x.size, rows, weight, next, y);
  } else if (w.form == BITS6_HALVES) {
    multiply_grouped_block8<2, float>(x.int8, x.size, rows, weight, next, y);
  } else {
    with_low_bits(w.form, [&](auto low) {
      typedef decltype(low) G;
      const int64_t bytes = x.size / INT8_GROUP * 2 * G::bytes;
      in_tiles<INT8_TILE>(rows, next, bytes, [&](int first, auto count, Prefetch ahead) {
        multiply_low_tile<decltype(count)::value, G>(x.int8.from(first), x.size, weight, ahead,
                                                     y + first * BLOCK);
      });
    });
  }
}

// f(r, c) for each vector of `rows` rows of a block: those from column c on.
template <class F> static inline void each_vector(int rows, const F& f) {
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < BLOCK; c += LANES) f(r, c);
}

// y [rows, BLOCK], rounded, as block b of to [rows, size].
template <class T, class Y>
static inline void store_block(const float* y, int rows, int64_t b, Y* to, int64_t size) {
  each_vector(rows, [&](int r, int c) {
    store_nearest<T>(to + r * size + b * BLOCK + c, load(y + r * BLOCK + c));
  });
}

// The low-rank rows of a layer's adapter, down . x of the SAT rows: [sats, rank].
template <class T> class LowRank {
 public:
  LowRank(int64_t sats, int64_t most_rank, bool int8)
      : rows(sats), y(sats * BLOCK), values(sats * most_rank), quantize(int8 * sats, most_rank) {}

  // Too little to share among threads: each computes all of it. x: of the SATs.
  void compute(const Linear& l, const Rows<T>& x, const char* next) {
    const int blocks = rows ? l.rank / BLOCK : 0;
    for (int b = 0; b < blocks; b++) {
      multiply_block(x, rows, l.down, b, b + 1 < blocks ? l.down.block(b + 1) : next, y.data());
      store_block<T>(y.data(), rows, b, values.data(), l.rank);
    }
    low = {values.data(), l.rank, quantize(values.data(), l.rank, l.rank ? rows : 0)};
  }

  // Add up . low to block b of the SAT rows y.
  void add(const Linear& l, int64_t b, const char* next, float* sat_rows) {
    if (!l.rank || !rows) return;
    multiply_block(low, rows, l.up, b, next, y.data());
    for (int i = 0; i < rows * BLOCK; i += LANES)
      store(sat_rows + i, load(sat_rows + i) + load(y.data() + i));
  }

 private:
  const int rows;
  std::vector<float> y;
  std::vector<Input<T>> values;
  Quantizer quantize;
  Rows<T> low{};
};

// One thread's share of the linear layers of a pass over `rows` rows, the last `sats` of them SATs.
template <class T> class LinearShare {
 public:
  LinearShare(Worker& worker, int64_t rows, int64_t sats, int64_t most_rank, bool int8)
      : worker(worker), rows(rows), sats(sats), low(sats, most_rank, int8),
        low_beside(sats, most_rank, int8), y(rows * BLOCK), y_beside(rows * BLOCK) {}

  // store(b, y [rows, BLOCK]) for each block b of l(x) that is this thread's. then: the layer that
  // is read after it.
  template <class Store>
  void each_block(const Linear& l, const Rows<T>& x, const Linear& then, const Store& store) {
    low.compute(l, x.from(rows - sats), first_block(l));
    worker.each(l.out / BLOCK, [&](int64_t b) {
      block(l, b, x, low, read_after(l, b, then), y);
      store(b, y.data());
    });
  }

  // store(b, y, y of `beside`) of two layers of one size, whose blocks are read in turns.
  template <class Store>
  void each_pair_of_blocks(const Linear& l, const Linear& beside, const Rows<T>& x,
                           const Linear& then, const Store& store) {
    low.compute(l, x.from(rows - sats), read_first(beside));
    low_beside.compute(beside, x.from(rows - sats), first_block(l));
    worker.each(l.out / BLOCK, [&](int64_t b) {
      block(l, b, x, low, beside.weight.block(b), y);
      block(beside, b, x, low_beside, read_after(l, b, then), y_beside);
      store(b, y.data(), y_beside.data());
    });
  }

  // to [rows, out] = l(x), rounded.
  template <class Y> void project(const Linear& l, const Rows<T>& x, Y* to, const Linear& then) {
    each_block(l, x, then, [&](int64_t b, const float* y) {
      store_block<T>(y, rows, b, to, l.out);
    });
  }

  // The same of a layer without an adapter, and of the last `count` rows, which begin at x.
  template <class Store>
  void each_block_of_head(const Linear& l, int64_t blocks, const Rows<T>& x, int count,
                          const Linear& then, const Store& store) {
    worker.each(blocks, [&](int64_t b) {
      multiply_with_bias(l, b, x, count, read_after(l, b, then), y.data());
      store(b, y.data());
    });
  }

 private:
  const char* first_block(const Linear& l) const {
    return l.weight.block(worker.begin(l.out / BLOCK));
  }

  const char* read_first(const Linear& l) const {
    return sats && l.rank ? l.down.weight : first_block(l);
  }

  // What this thread reads after block b of a layer.
  const char* read_after(const Linear& l, int64_t b, const Linear& then) const {
    return b + 1 < worker.end(l.out / BLOCK) ? l.weight.block(b + 1) : read_first(then);
  }

  void multiply_with_bias(const Linear& l, int64_t b, const Rows<T>& x, int count,
                          const char* next, float* y) {
    multiply_block(x, count, l.weight, b, next, y);
    if (!l.bias) return;
    const T* bias = (const T*)l.bias + b * BLOCK;
    each_vector(count, [&](int r, int c) {
      store(y + r * BLOCK + c, load(y + r * BLOCK + c) + load(bias + c));
    });
  }

  void block(const Linear& l, int64_t b, const Rows<T>& x, LowRank<T>& low, const char* next,
             std::vector<float>& y) {
    multiply_with_bias(l, b, x, rows, next, y.data());
    low.add(l, b, next, y.data() + (rows - sats) * BLOCK);
  }

  Worker& worker;
  const int rows, sats;
  LowRank<T> low, low_beside;
  std::vector<float> y, y_beside;
};
