// Linear layers in 4 and 5 bits: a third of the bytes to read, for passes that only draft; and what
// quantized files hold (models/blocks.py).
//
// An element of a weight is value * scale + least, with a scale and a least number for INT8_GROUP
// inputs of an output; or (value - 16) * scale. A group of LANES outputs lies together: the lower 4
// bits of its values, two steps in a byte, [step / 2][LANES][4]; their highest bits, where there are
// 5, one step in a bit, [LANES][4]; the scales [LANES]; and the least numbers [LANES]. Rows are in 8
// bits, as in int8.h. Fast: where integers of 16 bits are added, half a group's sums fit them,
// because weights are so small. Exact: as in 8 bits.
#pragma once
#include "int8.h"
#include "structs.h"

constexpr int LOW_STEPS = INT8_GROUP / INT8_STEP;     // of a group
constexpr int LOW_PART = LANES * INT8_STEP;           // bytes of two steps' lower bits
constexpr int LOW_HIGH = LOW_STEPS / 2 * LOW_PART;    // where a group's highest bits lie

// How a group lies in memory. WITH_LEAST: least numbers are added, instead of 16 taken from values.
template <int BITS, class SCALE, bool WITH_LEAST> struct LowBits {
  typedef SCALE Scale;
  static constexpr int bits = BITS;
  static constexpr bool with_least = WITH_LEAST;
  static constexpr int scales = LOW_HIGH + (BITS == 5 ? LOW_PART : 0);
  static constexpr int least = scales + LANES * sizeof(SCALE);
  static constexpr int bytes = least + (WITH_LEAST ? LANES * sizeof(SCALE) : 0);
};

// f(a value of the LowBits of a form); of other forms, not at all.
template <class F> static inline void with_low_bits(int64_t form, const F& f) {
  switch (form) {
    case INT5: return f(LowBits<5, bf16, false>());
    case BITS5: return f(LowBits<5, f16, false>());
    case BITS5_LEAST: return f(LowBits<5, f16, true>());
    case BITS4_LEAST: return f(LowBits<4, f16, true>());
    case BITS5_LEAST_FLOAT: return f(LowBits<5, float, true>());
    case BITS4_LEAST_FLOAT: return f(LowBits<4, float, true>());
  }
}

// ---- a group: sums[r] = w * x[r] over INT8_GROUP inputs of LANES outputs, for R rows ----

#ifdef __AVX512VNNI__
template <int BITS, int R>
static inline void multiply_group(i32x* sums, const char* w, const int8_t* x) {
  const __m512i high = BITS == 5 ? _mm512_loadu_si512(w + LOW_HIGH) : __m512i{};
#pragma GCC unroll 8
  for (int s = 0; s < LOW_STEPS; s++) {
    const __m512i two = _mm512_loadu_si512(w + s / 2 * LOW_PART);
    const __m512i low = _mm512_and_si512(s % 2 ? _mm512_srli_epi32(two, 4) : two,
                                         _mm512_set1_epi8(15));
    const __m512i top = s < 4 ? _mm512_slli_epi32(high, 4 - s) : _mm512_srli_epi32(high, s - 4);
    const __m512i value =
        BITS == 5 ? _mm512_or_si512(low, _mm512_and_si512(top, _mm512_set1_epi8(16))) : low;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      __m512i four = _mm512_set1_epi32(four_bytes(x + r * INT8_GROUP + s * INT8_STEP));
      sums[r] = (i32x)_mm512_dpbusd_epi32((__m512i)sums[r], value, four);
    }
  }
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
template <int BITS, int R>
static inline void multiply_group(i32x* sums, const char* w, const int8_t* x) {
  constexpr int HALF = LOW_STEPS / 2;
  const __m256i high = BITS == 5 ? _mm256_loadu_si256((const __m256i*)(w + LOW_HIGH)) : __m256i{};
#pragma GCC unroll 2
  for (int first = 0; first < LOW_STEPS; first += HALF) {
    __m256i value[HALF];
#pragma GCC unroll 4
    for (int i = 0; i < HALF; i++) {
      const int s = first + i;
      const __m256i two = _mm256_loadu_si256((const __m256i*)(w + s / 2 * LOW_PART));
      const __m256i low = _mm256_and_si256(s % 2 ? _mm256_srli_epi32(two, 4) : two,
                                           _mm256_set1_epi8(15));
      const __m256i top = s < 4 ? _mm256_slli_epi32(high, 4 - s) : _mm256_srli_epi32(high, s - 4);
      value[i] =
          BITS == 5 ? _mm256_or_si256(low, _mm256_and_si256(top, _mm256_set1_epi8(16))) : low;
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
template <int BITS, int R>
static inline void multiply_group(i32x* sums, const char* w, const int8_t* x) {
  for (int s = 0; s < LOW_STEPS; s++)
    for (int o = 0; o < LANES; o++)
      for (int i = 0; i < INT8_STEP; i++) {
        const int at = o * INT8_STEP + i;
        const int low = uint8_t(w[s / 2 * LOW_PART + at]) >> (s % 2 * 4) & 15;
        const int top = BITS == 5 ? uint8_t(w[LOW_HIGH + at]) >> s & 1 : 0;
        for (int r = 0; r < R; r++)
          sums[r][o] += (low + INT5_OFFSET * top) * x[r * INT8_GROUP + s * INT8_STEP + i];
      }
}
#endif

// ---- a tile of rows ----

// y [R, BLOCK] = x [R, size] . w, one block of outputs. G: a LowBits.
template <int R, class G>
static __attribute__((noinline)) void multiply_low_tile(Int8Rows x, int64_t size, const char* w,
                                                        Prefetch ahead, float* y) {
  const int groups = size / INT8_GROUP;
  for (int h = 0; h < 2; h++) {  // LANES outputs, whose sums over all inputs stay together
    f32x sums[R] = {};
    for (int g = 0; g < groups; g++, w += G::bytes) {
      ahead.fetch(G::bytes);
      i32x whole[R];
      for (int r = 0; r < R; r++)
        whole[r] = (G::with_least ? 0 : x.starts[g * x.count + r]) - i32x{};
      multiply_group<G::bits, R>(whole, w, x.bytes + g * x.count * INT8_GROUP);
      const f32x scale = load((const typename G::Scale*)(w + G::scales));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const int64_t at = g * x.count + r;
        sums[r] += __builtin_convertvector(whole[r], f32x) * (scale * x.scales[at]);
        if constexpr (G::with_least)
          sums[r] += load((const typename G::Scale*)(w + G::least)) * x.totals[at];
      }
    }
    for (int r = 0; r < R; r++) store(y + r * BLOCK + h * LANES, sums[r]);
  }
}
