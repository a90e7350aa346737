// Inner products of many rows with a block of outputs, in bfloat16 and float.
//
// Weights lie [out / BLOCK][in / STEP][2][LANES][STEP], so that one read fills a vector with the
// weights of LANES outputs. Fast: the sums of up to TILE rows stay in registers while each weight
// is read once, and the next block's weights come from memory meanwhile. Exact: an output is added
// up over its inputs in order, in a lane of its own, whatever number of rows stands beside it.
#pragma once
#include <utility>

#include "vectors.h"

constexpr int BLOCK = 2 * LANES;  // outputs that are computed together
constexpr int CACHE_LINE = 64;    // bytes

// Rows whose sums fit the registers beside the weights.
#ifdef __AVX512BF16__
constexpr int TILE = 14;
#elif defined(__AVX512F__)
constexpr int TILE = 12;
#else
constexpr int TILE = 6;
#endif

// Up to so many rows, one tile, prefetches go into the second cache, and leave the first to the
// block that is multiplied. It was measured with AVX2 only; 0: never.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int FEW_ROWS = TILE;
#else
constexpr int FEW_ROWS = 0;
#endif

// Inputs that one step takes, and how inputs of T lie there: where no instruction multiplies
// bfloat16, as floats, though each is a bfloat16.
template <class T> struct Operand {
  static constexpr int step = 1;
  typedef float input;
};
template <> struct Operand<bf16> {
  static constexpr int step = 2;
#ifdef __AVX512BF16__
  typedef bf16 input;
#else
  typedef float input;
#endif
};
template <class T> constexpr int STEP = Operand<T>::step;
template <class T> using Input = typename Operand<T>::input;

// ---- one step ----

// sums[r][c] += weight(c) * input(r) for R rows and C vectors of outputs; whichever are fewer wait
// in registers for the others.
template <int R, int C, class Weight, class GetInput, class Add>
static inline void add_products(f32x (&sums)[R][C], Weight weight, GetInput input, Add add) {
  if constexpr (C <= R) {
    decltype(weight(0)) w[C];
    for (int c = 0; c < C; c++) w[c] = weight(c);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      auto x = input(r);
      for (int c = 0; c < C; c++) sums[r][c] = add(sums[r][c], w[c], x);
    }
  } else {
    decltype(input(0)) x[R];
    for (int r = 0; r < R; r++) x[r] = input(r);
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      auto w = weight(c);
      for (int r = 0; r < R; r++) sums[r][c] = add(sums[r][c], w, x[r]);
    }
  }
}

static inline f32x plus_product(f32x sum, f32x w, f32x x) { return sum + w * x; }

// One step of inner products: vectors of weights lie `apart` from each other, rows of inputs `ld`.
// Lambdas stand where they are used: GCC keeps in memory what those with a name refer to.
template <int R, int C>
static inline void add_step(f32x (&sums)[R][C], const float* w, int64_t apart, const float* x,
                            int64_t ld) {
  add_products(
      sums, [&](int c) { return load(w + c * apart); },
      [&](int r) { return broadcast(x[r * ld]); }, plus_product);
}

#ifdef __AVX512BF16__
template <int R, int C>
static inline void add_step(f32x (&sums)[R][C], const bf16* w, int64_t apart, const bf16* x,
                            int64_t ld) {
  auto pair = [&](int r) {
    int32_t bits;
    memcpy(&bits, x + r * ld, sizeof bits);
    return _mm512_set1_epi32(bits);
  };
  add_products(
      sums, [&](int c) { return _mm512_loadu_si512(w + c * apart); }, pair,
      [](f32x sum, __m512i w, __m512i x) {
        return (f32x)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
      });
}
#else
template <int R, int C>
static inline void add_step(f32x (&sums)[R][C], const bf16* w, int64_t apart, const float* x,
                            int64_t ld) {
  auto pairs = [&](int c) {
    u32x v;
    memcpy(&v, w + c * apart, sizeof v);
    return v;
  };
  add_products(
      sums, [&](int c) { return as_f32(pairs(c) << BF16_SHIFT); },
      [&](int r) { return broadcast(x[r * ld]); }, plus_product);
  asm("" : "+r"(w));  // read the pairs again: there are too few registers to keep them
  add_products(
      sums, [&](int c) { return as_f32(pairs(c) & BF16_MASK); },
      [&](int r) { return broadcast(x[r * ld + 1]); }, plus_product);
}
#endif

// ---- a tile of rows ----

// What is read after a block: while rows are multiplied by the block, it comes from memory, a part
// of it with every tile of rows.
struct Prefetch {
  const char* at;
  int tiles;
  bool into_second_cache;
  void fetch(int bytes) {  // of `bytes` that are read of the block
    for (int line = 0; line < bytes; line += CACHE_LINE) {
      if (into_second_cache) __builtin_prefetch(at, 0, 2);
      else __builtin_prefetch(at);
      at += CACHE_LINE / tiles;
    }
  }
};

// y [R, BLOCK] = x [R, size] . w, one block of outputs. Within its caller it would lack registers.
template <class T, int R>
static __attribute__((noinline)) void multiply_tile(const Input<T>* x, int64_t size, const T* w,
                                                    Prefetch ahead, float* y) {
  constexpr int S = STEP<T>;
  f32x sums[R][2] = {};
  for (int i = 0; i < size; i += S, w += BLOCK * S) {
    ahead.fetch(BLOCK * S * sizeof(T));
    add_step(sums, w, LANES * S, x + i, size);
  }
  for (int r = 0; r < R; r++) {
    store(y + r * BLOCK, sums[r][0]);
    store(y + r * BLOCK + LANES, sums[r][1]);
  }
}

// f(count as a constant) for a count from 1 to MOST.
template <class F, int... I>
static inline void with_constant(int count, const F& f, std::integer_sequence<int, I...>) {
  ((count == I + 1 && (f(std::integral_constant<int, I + 1>()), true)) || ...);
}
template <int MOST, class F> static inline void with_constant(int count, const F& f) {
  with_constant(count, f, std::make_integer_sequence<int, MOST>());
}

// f(first row, count of rows as a constant, what to fetch) for all rows, in as few tiles of at most
// MOST as there must be, of nearly equal size. next: `bytes` that are read after this. FEW: see
// FEW_ROWS.
template <int MOST, int FEW = 0, class F>
static inline void in_tiles(int rows, const char* next, int64_t bytes, const F& f) {
  const int tiles = (rows + MOST - 1) / MOST;
  int first = 0;
  for (int t = 0; t < tiles; t++) {
    const int count = (rows - first + tiles - t - 1) / (tiles - t);
    const Prefetch ahead{next + bytes / tiles * t, tiles, rows <= FEW};
    with_constant<MOST>(count, [&](auto constant) { f(first, constant, ahead); });
    first += count;
  }
}
