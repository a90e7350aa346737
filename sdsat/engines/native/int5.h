// Linear layers in 5 bits: a third of the bytes to read, for passes that only draft.
//
// An element of a weight is (value - 16) * the scale of its output and of INT8_GROUP inputs. A
// group of LANES outputs lies together: the lower 4 bits of its values, two steps in a byte, [step /
// 2][LANES][4]; their highest bits, one step in a bit, [LANES][4]; and the scales in bfloat16
// [LANES]. Rows are in 8 bits, as in int8.h. Fast: where integers of 16 bits are added, half a
// group's sums fit them, because weights are so small. Exact: as in 8 bits.
#pragma once
#include "int8.h"

constexpr int INT5_STEPS = INT8_GROUP / INT8_STEP;         // of a group
constexpr int INT5_PART = LANES * INT8_STEP;               // bytes of two steps' lower bits
constexpr int INT5_HIGH = INT5_STEPS / 2 * INT5_PART;      // where a group's highest bits lie
constexpr int INT5_SCALES = INT5_HIGH + INT5_PART;         // where its scales lie
constexpr int INT5_BYTES = INT5_SCALES + LANES * sizeof(bf16);  // of a group

// Rows that share what is read and unpacked.
#ifdef __AVX512F__
constexpr int INT5_TILE = 10;
#else
constexpr int INT5_TILE = 8;
#endif

// ---- a group: sums[r] = w * x[r] over INT8_GROUP inputs of LANES outputs, for R rows ----

#ifdef __AVX512VNNI__
template <int R>
static inline void multiply_group5(i32x* sums, const char* w, const int8_t* x) {
  const __m512i high = _mm512_loadu_si512(w + INT5_HIGH);
#pragma GCC unroll 8
  for (int s = 0; s < INT5_STEPS; s++) {
    const __m512i two = _mm512_loadu_si512(w + s / 2 * INT5_PART);
    const __m512i low = _mm512_and_si512(s % 2 ? _mm512_srli_epi32(two, 4) : two,
                                         _mm512_set1_epi8(15));
    const __m512i top = s < 4 ? _mm512_slli_epi32(high, 4 - s) : _mm512_srli_epi32(high, s - 4);
    const __m512i value = _mm512_or_si512(low, _mm512_and_si512(top, _mm512_set1_epi8(16)));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      __m512i four = _mm512_set1_epi32(four_bytes(x + r * INT8_GROUP + s * INT8_STEP));
      sums[r] = (i32x)_mm512_dpbusd_epi32((__m512i)sums[r], value, four);
    }
  }
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
template <int R>
static inline void multiply_group5(i32x* sums, const char* w, const int8_t* x) {
  constexpr int HALF = INT5_STEPS / 2;
  const __m256i high = _mm256_loadu_si256((const __m256i*)(w + INT5_HIGH));
#pragma GCC unroll 2
  for (int first = 0; first < INT5_STEPS; first += HALF) {
    __m256i value[HALF];
#pragma GCC unroll 4
    for (int i = 0; i < HALF; i++) {
      const int s = first + i;
      const __m256i two = _mm256_loadu_si256((const __m256i*)(w + s / 2 * INT5_PART));
      const __m256i low = _mm256_and_si256(s % 2 ? _mm256_srli_epi32(two, 4) : two,
                                           _mm256_set1_epi8(15));
      const __m256i top = s < 4 ? _mm256_slli_epi32(high, 4 - s) : _mm256_srli_epi32(high, s - 4);
      value[i] = _mm256_or_si256(low, _mm256_and_si256(top, _mm256_set1_epi8(16)));
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const int8_t* own = x + r * INT8_GROUP + first * INT8_STEP;
      __m256i pairs;  // four sums of two products of 31 * 127 fit 16 bits
#pragma GCC unroll 4
      for (int i = 0; i < HALF; i++) {
        __m256i four = _mm256_set1_epi32(four_bytes(own + i * INT8_STEP));
        __m256i product = _mm256_maddubs_epi16(value[i], four);
        pairs = i ? _mm256_add_epi16(pairs, product) : product;
      }
      sums[r] += (i32x)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
  }
}
#else
template <int R>
static inline void multiply_group5(i32x* sums, const char* w, const int8_t* x) {
  for (int s = 0; s < INT5_STEPS; s++)
    for (int o = 0; o < LANES; o++)
      for (int i = 0; i < INT8_STEP; i++) {
        const int at = o * INT8_STEP + i;
        const int low = uint8_t(w[s / 2 * INT5_PART + at]) >> (s % 2 * 4) & 15;
        const int top = uint8_t(w[INT5_HIGH + at]) >> s & 1;
        for (int r = 0; r < R; r++)
          sums[r][o] += (low + INT5_OFFSET * top) * x[r * INT8_GROUP + s * INT8_STEP + i];
      }
}
#endif

// ---- a tile of rows ----

// y [R, BLOCK] = x [R, size] . w, one block of outputs.
template <int R>
static inline void multiply_tile5(const Int8Rows& x, int64_t size, const char* w, Prefetch ahead,
                                  float* y) {
  const int groups = size / INT8_GROUP;
  for (int h = 0; h < 2; h++) {  // LANES outputs, whose sums over all inputs stay together
    f32x sums[R] = {};
    for (int g = 0; g < groups; g++, w += INT5_BYTES) {
      ahead.fetch(INT5_BYTES);
      i32x whole[R];
      for (int r = 0; r < R; r++) whole[r] = x.starts[g * x.count + r] - i32x{};
      multiply_group5<R>(whole, w, x.bytes + g * x.count * INT8_GROUP);
      const f32x scale = load((const bf16*)(w + INT5_SCALES));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const int64_t at = g * x.count + r;
        sums[r] += __builtin_convertvector(whole[r], f32x) * (scale * x.scales[at]);
      }
    }
    for (int r = 0; r < R; r++) store(y + r * BLOCK + h * LANES, sums[r]);
  }
}
