// Linear layers in 8 bits: half the bytes to read, for a model in 8 bits (models/int8.py), and what
// quantized files hold (models/blocks.py).
//
// An element of a weight is (byte - 128) * its output's scale; weights lie [out / LANES][in / 4]
// [LANES][4]. Or there is a scale for each INT8_GROUP inputs, or for each half of them: then scales
// [1 or 2][LANES] lie behind each such group. Rows are put into 8 bits too, with a scale for each
// INT8_GROUP inputs. Fast: the products of a group are added up as integers, four in one
// instruction where there is one. Exact: integer sums have no order, and a group's sums are added
// to an output's in order of its inputs.
#pragma once
#include <cmath>
#include <vector>

#include "kernels.h"

constexpr int INT8_GROUP = 32;       // inputs with one scale
constexpr int INT8_LARGEST = 127;    // in size, of an input
constexpr int INT8_STEP = 4;         // inputs that one step takes
constexpr int INT5_OFFSET = 16;      // what values in 5 bits are above their weights (low_bits.h)
constexpr float INT8_TINY = 1e-20f;  // the largest of a group counts as no less

// Rows that share what is read and unpacked.
#ifdef __AVX512F__
constexpr int INT8_TILE = 10;
#else
constexpr int INT8_TILE = 8;
#endif

// What the weights' bytes are above their values, where add_step8() leaves it in them.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int INT8_OFFSET = 0;
#else
constexpr int INT8_OFFSET = 128;
#endif

// Rows in 8 bits, group by group of inputs: a tile's rows lie beside each other.
struct Int8Rows {
  const int8_t* bytes;   // [size / INT8_GROUP, count, INT8_GROUP]; null: there are none
  const float* scales;   // [size / INT8_GROUP, count]
  const int32_t* starts;  // [size / INT8_GROUP, count]: what INT5_OFFSET takes from each output
  const int32_t* halves;  // [size / INT8_GROUP, count]: of that, what the first half of inputs has
  const float* totals;   // [size / INT8_GROUP, count]: sums of the numbers that bytes stand for
  const float* offsets;  // [count]: what INT8_OFFSET adds to each output before its scale
  int64_t count;         // of all rows

  Int8Rows from(int64_t row) const {
    if (!bytes) return *this;
    return {bytes + row * INT8_GROUP, scales + row, starts + row, halves + row,
            totals + row,             offsets + row, count};
  }
};

// ---- one step: sums[r] += w * x[r] over INT8_STEP inputs of LANES outputs, for R rows ----

static inline int32_t four_bytes(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return four;
}

#ifdef __AVX512VNNI__
template <int R>
static inline void add_step8(i32x* sums, const uint8_t* w, const int8_t* x) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    __m512i four = _mm512_set1_epi32(four_bytes(x + r * INT8_GROUP));
    sums[r] = (i32x)_mm512_dpbusd_epi32((__m512i)sums[r], _mm512_loadu_si512(w), four);
  }
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
template <int R>
static inline void add_step8(i32x* sums, const uint8_t* w, const int8_t* x) {
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)w);
  const __m256i own = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));  // w - 128
  const __m256i size = _mm256_abs_epi8(own);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    // |w| * (x with the sign of w): the sum of two products of 127 * 127 still fits 16 bits
    __m256i four = _mm256_sign_epi8(_mm256_set1_epi32(four_bytes(x + r * INT8_GROUP)), own);
    __m256i pairs = _mm256_maddubs_epi16(size, four);
    sums[r] += (i32x)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
}
#else
template <int R>
static inline void add_step8(i32x* sums, const uint8_t* w, const int8_t* x) {
  for (int r = 0; r < R; r++)
    for (int o = 0; o < LANES; o++)
      for (int i = 0; i < INT8_STEP; i++)
        sums[r][o] += int32_t(w[INT8_STEP * o + i]) * x[r * INT8_GROUP + i];
}
#endif

// The same over half a group, of weights from -32 to 31.
#if defined(__AVX2__) && !defined(__AVX512F__)
template <int R>
static inline void add_half_group6(i32x* sums, const uint8_t* w, const int8_t* x) {
  constexpr int STEPS = INT8_GROUP / 2 / INT8_STEP;
  __m256i own[STEPS], size[STEPS];
#pragma GCC unroll 4
  for (int s = 0; s < STEPS; s++) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)(w + s * LANES * INT8_STEP));
    own[s] = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    size[s] = _mm256_abs_epi8(own[s]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    __m256i pairs;  // four sums of two products of 32 * 127 fit 16 bits
#pragma GCC unroll 4
    for (int s = 0; s < STEPS; s++) {
      __m256i four = _mm256_set1_epi32(four_bytes(x + r * INT8_GROUP + s * INT8_STEP));
      __m256i product = _mm256_maddubs_epi16(size[s], _mm256_sign_epi8(four, own[s]));
      pairs = s ? _mm256_add_epi16(pairs, product) : product;
    }
    sums[r] += (i32x)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
}
#else
template <int R>
static inline void add_half_group6(i32x* sums, const uint8_t* w, const int8_t* x) {
#pragma GCC unroll 4
  for (int i = 0; i < INT8_GROUP / 2; i += INT8_STEP) add_step8<R>(sums, w + i * LANES, x + i);
}
#endif

// ---- a tile of rows ----

// y [R, BLOCK] = x [R, size] . w, one block of outputs with their scales. Within its caller it
// would lack registers, as the other tiles would.
template <int R>
static __attribute__((noinline)) void multiply_tile8(Int8Rows x, int64_t size, const uint8_t* w,
                                                     const float* scale, Prefetch ahead, float* y) {
  const int groups = size / INT8_GROUP;
  for (int h = 0; h < 2; h++) {  // LANES outputs, whose sums over all inputs stay together
    f32x sums[R] = {};
    for (int g = 0; g < groups; g++, w += LANES * INT8_GROUP) {
      i32x whole[R] = {};
#pragma GCC unroll 8
      for (int i = 0; i < INT8_GROUP; i += INT8_STEP) {
        if (i * LANES % CACHE_LINE == 0) ahead.fetch(CACHE_LINE);
        add_step8<R>(whole, w + i * LANES, x.bytes + g * x.count * INT8_GROUP + i);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
        sums[r] += __builtin_convertvector(whole[r], f32x) * x.scales[g * x.count + r];
    }
    for (int r = 0; r < R; r++) {
      f32x scaled = (sums[r] - x.offsets[r]) * load(scale + h * LANES);
      store(y + r * BLOCK + h * LANES, scaled);
    }
  }
}

// The same of weights with PARTS scales of type Scale for each group of inputs, behind the group.
// Where there are two, weights are from -32 to 31.
template <int R, int PARTS, class Scale>
static __attribute__((noinline)) void multiply_grouped_tile8(Int8Rows x, int64_t size,
                                                             const char* w, Prefetch ahead,
                                                             float* y) {
  constexpr int BYTES = LANES * INT8_GROUP;     // of a group, without scales
  constexpr int INPUTS = INT8_GROUP / PARTS;    // that share a scale
  constexpr int TIMES = INT8_OFFSET / INT5_OFFSET;  // what starts are for INT8_OFFSET
  const int groups = size / INT8_GROUP;
  for (int h = 0; h < 2; h++) {
    f32x sums[R] = {};
    for (int g = 0; g < groups; g++) {
      const Scale* scales = (const Scale*)(w + BYTES);
      ahead.fetch(PARTS * LANES * sizeof(Scale));
      for (int p = 0; p < PARTS; p++) {
        i32x whole[R];
        for (int r = 0; r < R; r++) {
          const int64_t at = g * x.count + r;
          const int32_t start = PARTS == 1 ? x.starts[at]
                                : p        ? x.starts[at] - x.halves[at]
                                           : x.halves[at];
          whole[r] = TIMES * start - i32x{};
        }
        const uint8_t* part = (const uint8_t*)w + p * INPUTS * LANES;
        const int8_t* rows = x.bytes + g * x.count * INT8_GROUP + p * INPUTS;
        if constexpr (PARTS == 2) {
          ahead.fetch(INPUTS * LANES);
          add_half_group6<R>(whole, part, rows);
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < INPUTS; i += INT8_STEP) {
            if (i * LANES % CACHE_LINE == 0) ahead.fetch(CACHE_LINE);
            add_step8<R>(whole, part + i * LANES, rows + i);
          }
        }
        const f32x scale = load(scales + p * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
          sums[r] += __builtin_convertvector(whole[r], f32x) * (scale * x.scales[g * x.count + r]);
      }
      w += BYTES + PARTS * LANES * sizeof(Scale);
    }
    for (int r = 0; r < R; r++) store(y + r * BLOCK + h * LANES, sums[r]);
  }
}

// ---- rows into 8 bits ----

// Room for rows in 8 bits.
class Quantizer {
 public:
  Quantizer(int64_t rows, int64_t size)
      : bytes(rows * size), scales(rows * size / INT8_GROUP), starts(scales.size()),
        halves(scales.size()), totals(scales.size()), offsets(rows) {}

  // x [rows, size] in 8 bits; valid until the next call.
  template <class X> Int8Rows operator()(const X* x, int64_t size, int rows) {
    if (bytes.empty()) return {};
    for (int r = 0; r < rows; r++) {
      float total = 0;  // of the values that the bytes stand for
      for (int64_t g = 0; g < size / INT8_GROUP; g++) {
        const int64_t at = g * rows + r;
        const int32_t units = quantize_group(x + r * size + g * INT8_GROUP, at);
        starts[at] = -INT5_OFFSET * units;
        totals[at] = units * scales[at];
        total += totals[at];
      }
      offsets[r] = INT8_OFFSET * total;
    }
    return {bytes.data(),  scales.data(),  starts.data(), halves.data(),
            totals.data(), offsets.data(), rows};
  }

 private:
  // at: the group's number among all. Returns the sum of its bytes.
  template <class X> int32_t quantize_group(const X* x, int64_t at) {
    f32x largest = {};
    for (int h = 0; h < INT8_GROUP; h += LANES) {
      f32x a = load(x + h);
      a = a > -a ? a : -a;
      largest = a > largest ? a : largest;
    }
    const float top = std::max(INT8_TINY, largest_lane(largest));
    scales[at] = top / INT8_LARGEST;
    f32x units = {};
    for (int h = 0; h < INT8_GROUP; h += LANES) {
      f32x whole = nearest_whole(load(x + h) * (INT8_LARGEST / top));
      units += whole;
      if (h + LANES == INT8_GROUP / 2) halves[at] = -INT5_OFFSET * int32_t(sum(units));
      i8x small = __builtin_convertvector(__builtin_convertvector(whole, i32x), i8x);
      memcpy(bytes.data() + at * INT8_GROUP + h, &small, LANES);
    }
    const float all = sum(units);
    scales[at] += all - all;  // NaN, if one of the numbers is NaN or infinite
    return int32_t(all);
  }

  std::vector<int8_t> bytes;
  std::vector<float> scales;
  std::vector<int32_t> starts, halves;
  std::vector<float> totals, offsets;
};
