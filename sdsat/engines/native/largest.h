// The largest logits of a row, in order.
//
// Fast: once the list is full, a step looks at 4 vectors, and at single logits only where one of
// them beats the last of the list. Exact: of equals the lower id comes first, as a stable sort has
// it.
#pragma once
#include <limits>

#include "threads.h"
#include "vectors.h"

constexpr float LEAST = -std::numeric_limits<float>::infinity();

// The `count` largest of a row, largest first: ids and values [count]. What is no number counts as
// the least.
template <class T>
static void largest_of(const T* row, int64_t size, int64_t count, int64_t* ids, float* values) {
  int64_t held = 0;
  auto offer = [&](int64_t i, float v) {
    if (v != v) v = LEAST;
    if (held == count && !(v > values[held - 1])) return;
    int64_t j = held < count ? held++ : held - 1;
    for (; j > 0 && v > values[j - 1]; j--) {
      values[j] = values[j - 1];
      ids[j] = ids[j - 1];
    }
    values[j] = v;
    ids[j] = i;
  };
  constexpr int AT_ONCE = 4 * LANES;
  int64_t i = 0;
  for (; i + AT_ONCE <= size; i += AT_ONCE) {
    f32x a = load(row + i);
    f32x b = load(row + i + LANES);
    f32x c = load(row + i + 2 * LANES);
    f32x d = load(row + i + 3 * LANES);
    a = a > b ? a : b;
    c = c > d ? c : d;
    a = a > c ? a : c;
    if (held < count || any(a > broadcast(values[held - 1])))
      for (int j = 0; j < AT_ONCE; j++) offer(i + j, to_float(row[i + j]));
  }
  for (; i < size; i++) offer(i, to_float(row[i]));
}

// The same for rows x [rows, size]: ids and values [rows, count].
template <class T>
static void largest(const T* x, int64_t rows, int64_t size, int64_t count, int64_t* ids,
                    float* values, int threads) {
  parallel_for(threads, rows, [&](int64_t r) {
    largest_of(x + r * size, size, count, ids + r * count, values + r * count);
  });
}
