// Vectors of numbers: as many lanes as the processor has, and how they are loaded, stored, rounded.
//
// Fast: GCC's vector types become the widest instructions that the processor has, from one source.
// Exact: lanes never mix, except in sum(), which adds them in order; and values are rounded to
// bfloat16 as PyTorch rounds them, to the nearest, of two as near to the even one.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float f32x __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32x __attribute__((vector_size(4 * LANES)));
typedef int32_t i32x __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16x __attribute__((vector_size(2 * LANES)));
typedef int8_t i8x __attribute__((vector_size(LANES)));
typedef uint16_t bf16;  // the upper half of a float
struct f16 {            // a number in half precision
  uint16_t bits;
};

// ---- whole vectors ----

static inline f32x broadcast(float v) { return v - f32x{}; }

static inline f32x as_f32(u32x v) {
  f32x r;
  memcpy(&r, &v, sizeof r);
  return r;
}

static inline u32x as_u32(f32x v) {
  u32x r;
  memcpy(&r, &v, sizeof r);
  return r;
}

static inline float sum(f32x v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

static inline float largest_lane(f32x v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  float found = v[0];
  for (int i = 1; i < LANES; i++) found = std::max(found, v[i]);
  return found;
#endif
}

// Whether a comparison holds in any lane.
static inline bool any(i32x holds) {
  int64_t parts[sizeof holds / sizeof(int64_t)];
  memcpy(parts, &holds, sizeof holds);
  int64_t found = 0;
  for (int64_t part : parts) found |= part;
  return found != 0;
}

// ---- storage: float and bfloat16 ----

constexpr int BF16_SHIFT = 16;                // bits of a float that bfloat16 leaves out
constexpr uint32_t BF16_MASK = 0xffff0000u;   // those that it keeps
constexpr uint32_t BF16_BELOW_HALF = 0x7fff;  // a little less than half of its last place

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x) << BF16_SHIFT;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

static inline f32x load(const float* p) {
  f32x r;
  memcpy(&r, p, sizeof r);
  return r;
}
static inline f32x load(const bf16* p) {
  u16x v;
  memcpy(&v, p, sizeof v);
  return as_f32(__builtin_convertvector(v, u32x) << BF16_SHIFT);
}

static inline f32x load(const f16* p) {
#if defined(__AVX512F__)
  return (f32x)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (f32x)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  constexpr int F16_SHIFT = 13;               // bits of a float's mantissa that f16 lacks
  constexpr float F16_EXPONENTS = 0x1p112f;   // between the exponents of both
  u16x v;
  memcpy(&v, p, sizeof v);
  const u32x bits = __builtin_convertvector(v, u32x);
  const f32x size = as_f32((bits & 0x7fff) << F16_SHIFT) * F16_EXPONENTS;
  return as_f32(as_u32(size) | (bits & 0x8000) << BF16_SHIFT);
#endif
}

// The nearest bfloat16 of each lane in its upper half; ties to even.
static inline u32x nearest_bf16(f32x v) {
  return as_u32(v) + BF16_BELOW_HALF + ((as_u32(v) >> BF16_SHIFT) & 1);
}

static inline void store(float* p, f32x v) { memcpy(p, &v, sizeof v); }
static inline void store(bf16* p, f32x v) {
  u16x r = __builtin_convertvector(nearest_bf16(v) >> BF16_SHIFT, u16x);
  memcpy(p, &r, sizeof r);
}

// Rounded to T, as floats.
template <class T> static inline f32x nearest(f32x v) { return v; }
template <> inline f32x nearest<bf16>(f32x v) { return as_f32(nearest_bf16(v) & BF16_MASK); }

// Store what is rounded to T, whether as T or as float.
template <class T, class Y> static inline void store_nearest(Y* p, f32x v) {
  if constexpr (std::is_same<Y, T>::value) store(p, v);
  else store(p, nearest<T>(v));
}

// ---- functions ----

// The nearest whole numbers, for |v| < 2^22.
static inline f32x nearest_whole(f32x v) {
  constexpr float NO_FRACTION = 12582912.f;  // 1.5 * 2^23: floats of that size are whole
  return (v + NO_FRACTION) - NO_FRACTION;
}

// exp(x), in the range of floats: 2^n * exp(r) with |r| <= log(2) / 2, and a polynomial for exp(r).
static inline f32x exponential(f32x x) {
  constexpr float LOWEST = -87.f;
  constexpr float HIGHEST = 88.f;
  constexpr float LOG2_E = 1.44269504f;
  constexpr float LN2_HIGH = 0.693359375f;    // log(2) in two parts: n * LN2_HIGH is exact
  constexpr float LN2_LESS = 2.12194440e-4f;  // LN2_HIGH - log(2)
  constexpr int MANTISSA_BITS = 23;
  x = x < broadcast(LOWEST) ? broadcast(LOWEST) : x > broadcast(HIGHEST) ? broadcast(HIGHEST) : x;
  f32x n = nearest_whole(x * LOG2_E);
  f32x r = x - n * LN2_HIGH + n * LN2_LESS;
  f32x p = broadcast(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f})
    p = p * r + c;
  p = p * r * r + r + 1.f;
  return as_f32(as_u32(p) + (u32x)(__builtin_convertvector(n, i32x) << MANTISSA_BITS));
}

static inline f32x silu(f32x v) { return v / (exponential(-v) + 1.f); }
