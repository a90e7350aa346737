// A pass of a Llama-form decoder on a CPU: native.py builds this file at first use and describes every argument.
//
// A row's result has the same bits whatever rows stand beside it and wherever its context lies in the cache:
//   - a linear layer adds up each output over the inputs in order, in one lane of a vector, for any number of rows;
//   - attention numbers the keys a row may see 0, 1, 2, .. in order of position, and adds up in that order.
// So a token verified in a draft tree gets the bits that it gets alone, and drafting is lossless in bfloat16 too.
// Values are rounded to the model's type where transformers' modules round them.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

// Lanes of a vector, and rows whose sums fit its registers beside the weights: TILE, and in 8 bits TILE8.
#ifdef __AVX512BF16__
constexpr int LANES = 16, TILE = 14, TILE8 = 10;
#elif defined(__AVX512F__)
constexpr int LANES = 16, TILE = 12, TILE8 = 10;
#else
constexpr int LANES = 8, TILE = 6, TILE8 = 4;
#endif
constexpr int BLOCK = 2 * LANES, KEYS = 4 * LANES;  // outputs and keys that go together
constexpr int GROUP = 32;                           // in 8 bits: inputs of one scale

typedef float f32x __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32x __attribute__((vector_size(4 * LANES)));
typedef int32_t i32x __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16x __attribute__((vector_size(2 * LANES)));
typedef int8_t i8x __attribute__((vector_size(LANES)));
typedef uint16_t bf16;

// ---- errors: nothing here trusts an index, and no exception leaves the library or a thread of its own ----

struct Refused {
  const char* why;
};

static void check(bool holds, const char* why) {
  if (!holds) throw Refused{why};
}

static const char* const NO_MEMORY = "out of memory";  // native.py knows it by these words

// Nothing, or in one line why f could not be done.
template <class F> static const char* guarded(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const Refused& refused) {
    return refused.why;
  } catch (...) {
    return NO_MEMORY;
  }
}

// ---- threads ----

// Where the threads of a pass wait for each other, 200 times a pass. They spin for some microseconds, then sleep: where another process
// keeps a core busy, two of them share a core, and OpenMP's, which spin for milliseconds, would keep from work the one that is waited for.
class Meeting {
 public:
  void meet(int size) {
    uint32_t now = round;
    if (++arrived < size) return wait(now);
    arrived = 0, round++;
    if (!sleepers) return;
    std::lock_guard<std::mutex> held(lock);
    changed.notify_all();
  }

 private:
  void wait(uint32_t past) {
    auto began = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < 32; i++) {
        if (round != past) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
      }
    } while (std::chrono::steady_clock::now() - began < std::chrono::microseconds(20));
    std::unique_lock<std::mutex> held(lock);
    sleepers++;
    changed.wait(held, [&] { return round != past; });
    sleepers--;
  }
  std::mutex lock;
  std::condition_variable changed;
  std::atomic<uint32_t> round{0};
  std::atomic<int> arrived{0}, sleepers{0};
};

// One of `size` threads that do a thing together.
struct Member {
  Meeting& meeting;
  int rank, size;
  void meet() { meeting.meet(size); }
  int64_t begin(int64_t count) { return count * rank / size; }  // its part of 0 .. count - 1
  int64_t end(int64_t count) { return count * (rank + 1) / size; }
  template <class F> void each(int64_t count, const F& f) {
    for (int64_t i = begin(count); i < end(count); i++) f(i);
  }
};

// f(member, its own room) by every member, once all have their room, which make() allocates: where one has none, nobody begins,
// because who began would wait for it. f allocates nothing.
template <class Make, class F> static void together(int threads, const Make& make, const F& f) {
  check(threads >= 1, "threads: expected 1 or more");
  Meeting meeting;
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    Member me{meeting, omp_get_thread_num(), omp_get_num_threads()};
#else
    Member me{meeting, 0, 1};
#endif
    std::optional<decltype(make())> room;
    try {
      room.emplace(make());
    } catch (...) {
      failed = true;
    }
    me.meet();
    if (!failed) {
      f(me, *room);
      me.meet();  // so that nobody has long to wait, and spin, at OpenMP's own end
    }
  }
  if (failed) throw std::bad_alloc();
}

// f(i) for i from 0 to count - 1, which may allocate.
template <class F> static void each_together(int threads, int64_t count, const F& f) {
  std::atomic<bool> failed{false};
  together(threads, [] { return 0; }, [&](Member me, int) {
    try {
      me.each(count, f);
    } catch (...) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

// ---- storage types: load and store a vector, and the two inner products, for bfloat16 and float ----

static inline f32x all(float v) { return v - f32x{}; }
static inline f32x as_f32(u32x v) { f32x r; memcpy(&r, &v, sizeof r); return r; }
static inline u32x as_u32(f32x v) { u32x r; memcpy(&r, &v, sizeof r); return r; }
static inline float sum(f32x v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }

static inline float most(f32x v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  float found = v[0];
  for (int i = 1; i < LANES; i++) found = std::max(found, v[i]);
  return found;
#endif
}

static inline f32x load(const float* p) { f32x r; memcpy(&r, p, sizeof r); return r; }
static inline f32x load(const bf16* p) { u16x v; memcpy(&v, p, sizeof v); return as_f32(__builtin_convertvector(v, u32x) << 16); }
static inline void store(float* p, f32x v) { memcpy(p, &v, sizeof v); }
static inline u32x nearest_bf16(f32x v) { return as_u32(v) + 0x7fff + ((as_u32(v) >> 16) & 1); }  // upper halves; ties to even
static inline void store(bf16* p, f32x v) {
  u16x r = __builtin_convertvector(nearest_bf16(v) >> 16, u16x);
  memcpy(p, &r, sizeof r);
}
template <class T> static inline f32x rounded(f32x v) { return v; }
template <> inline f32x rounded<bf16>(f32x v) { return as_f32(nearest_bf16(v) & 0xffff0000u); }

// How an inner product over values of T goes: how many inputs one step takes, and as what they lie there, values of T all the same.
template <class T> struct Inner { static constexpr int step = 1; typedef float input; };
#ifdef __AVX512BF16__
template <> struct Inner<bf16> { static constexpr int step = 2; typedef bf16 input; };
#else
template <> struct Inner<bf16> { static constexpr int step = 2; typedef float input; };  // no instruction multiplies bfloat16
#endif
template <class T> using In = typename Inner<T>::input;

template <class T, class Y> static inline void put(Y* p, f32x v) {  // rounded to T
  if constexpr (std::is_same<Y, T>::value) store(p, v);
  else store(p, rounded<T>(v));
}

// sums[r][c] += weight(c) * input(r) for R rows and C vectors of outputs; whichever are fewer wait in registers for the others.
template <int R, int C, class Weight, class Input, class Add>
static inline void products(f32x (&sums)[R][C], Weight weight, Input input, Add add) {
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

// The same for one step of inner products: vectors of weights lie `apart` from each other, and rows of inputs `ld`.
static inline f32x plus_product(f32x sum, f32x w, f32x x) { return sum + w * x; }
template <int R, int C> static inline void step(f32x (&sums)[R][C], const float* w, int64_t apart, const float* x, int64_t ld) {
  products(sums, [&](int c) { return load(w + c * apart); }, [&](int r) { return all(x[r * ld]); }, plus_product);
}
#ifdef __AVX512BF16__
template <int R, int C> static inline void step(f32x (&sums)[R][C], const bf16* w, int64_t apart, const bf16* x, int64_t ld) {
  auto pair = [&](int r) {
    int32_t bits;
    memcpy(&bits, x + r * ld, 4);
    return _mm512_set1_epi32(bits);
  };
  products(sums, [&](int c) { return _mm512_loadu_si512(w + c * apart); }, pair,
           [](f32x sum, __m512i w, __m512i x) { return (f32x)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x); });
}
#else
template <int R, int C> static inline void step(f32x (&sums)[R][C], const bf16* w, int64_t apart, const float* x, int64_t ld) {
  auto pairs = [&](int c) { u32x v; memcpy(&v, w + c * apart, sizeof v); return v; };
  products(sums, [&](int c) { return as_f32(pairs(c) << 16); }, [&](int r) { return all(x[r * ld]); }, plus_product);
  asm("" : "+r"(w));  // read the pairs again: there are too few registers to keep them
  products(sums, [&](int c) { return as_f32(pairs(c) & 0xffff0000u); }, [&](int r) { return all(x[r * ld + 1]); }, plus_product);
}
#endif

static inline f32x nearest(f32x v) { return (v + 12582912.f) - 12582912.f; }  // whole numbers, by a magic one

static inline f32x exp16(f32x x) {
  x = x < all(-87.f) ? all(-87.f) : x > all(88.f) ? all(88.f) : x;
  f32x n = nearest(x * 1.44269504f);
  f32x r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32x p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
  p = p * r * r + r + 1.f;
  return as_f32(as_u32(p) + (u32x)(__builtin_convertvector(n, i32x) << 23));
}

// ---- linear layers: weights [out / BLOCK][in / step][2][LANES][step], in 8 bits [out / LANES][in / 4][LANES][4] ----

struct Matrix {
  const char* weight;
  const char* scale;  // BLOCK floats a block, where the weights are rounded to 8 bits: (byte - 128) * scale
  int64_t stride;     // bytes from one block of outputs to the next: what is read together lies together
  const char* block(int64_t b) const { return weight + b * stride; }
};

// Rows that a linear layer reads. Beside rounded weights they are rounded too, GROUP inputs to a scale.
template <class T> struct Rows {
  const In<T>* x;
  int64_t size;
  const int8_t* bytes;   // [rows, size]
  const float* scales;   // [rows, size / GROUP]
  const float* offsets;  // [rows]: what the weights' 128 adds, if step8() leaves it there
  Rows from(int64_t r) const {
    return {x + r * size, size, bytes + r * size, scales + r * (size / GROUP), offsets + r};
  }
};

// What is read after a block: while rows are multiplied by the block, it comes from memory, a part of it with every tile of rows.
struct Ahead {
  const char* at;
  int tiles;
  void fetch(int bytes) {  // of `bytes` that are read, in lines of 64
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(at), at += 64 / tiles;
  }
};

template <class T, int R> static inline void tile(const In<T>* x, int64_t size, const T* w, Ahead ahead, float* y) {
  constexpr int S = Inner<T>::step;
  f32x sums[R][2] = {};
  for (int i = 0; i < size; i += S, w += BLOCK * S) {
    ahead.fetch(BLOCK * S * sizeof(T));
    step(sums, w, LANES * S, x + i, size);
  }
  for (int r = 0; r < R; r++) store(y + r * BLOCK, sums[r][0]), store(y + r * BLOCK + LANES, sums[r][1]);
}

// sums[r] += w * x[r] over 4 inputs of each of LANES outputs, for R rows `ld` apart. w - 128 instead of w where OFFSET is 0.
#ifdef __AVX512VNNI__
constexpr int OFFSET = 128;
template <int R> static inline void step8(i32x* sums, const uint8_t* w, const int8_t* x, int64_t ld) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    int32_t four;
    memcpy(&four, x + r * ld, 4);
    sums[r] = (i32x)_mm512_dpbusd_epi32((__m512i)sums[r], _mm512_loadu_si512(w), _mm512_set1_epi32(four));
  }
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr int OFFSET = 0;
template <int R> static inline void step8(i32x* sums, const uint8_t* w, const int8_t* x, int64_t ld) {
  const __m256i own = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)w), _mm256_set1_epi8(-128)), size = _mm256_abs_epi8(own);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {  // |w| * (x with the sign of w): of two products of 127 * 127 the sum still fits 16 bits
    int32_t four;
    memcpy(&four, x + r * ld, 4);
    __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(four), own));
    sums[r] += (i32x)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
}
#else
constexpr int OFFSET = 128;
template <int R> static inline void step8(i32x* sums, const uint8_t* w, const int8_t* x, int64_t ld) {
  for (int r = 0; r < R; r++)
    for (int o = 0; o < LANES; o++)
      for (int i = 0; i < 4; i++) sums[r][o] += int32_t(w[4 * o + i]) * x[r * ld + i];
}
#endif

template <int R, class T>
static inline void tile8(const Rows<T>& x, const uint8_t* w, const float* scale, Ahead ahead, float* y) {
  const int groups = x.size / GROUP;
  for (int h = 0; h < 2; h++) {  // LANES outputs, whose sums over all inputs stay in registers
    f32x sums[R] = {};
    for (int g = 0; g < groups; g++, w += LANES * GROUP) {
      i32x a[R] = {};
#pragma GCC unroll 8
      for (int i = 0; i < GROUP; i += 4) {
        if (LANES == 16 || i % 8 == 0) ahead.fetch(64);
        step8<R>(a, w + i * LANES, x.bytes + g * GROUP + i, x.size);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sums[r] += __builtin_convertvector(a[r], f32x) * x.scales[r * groups + g];
    }
    for (int r = 0; r < R; r++) store(y + r * BLOCK + h * LANES, (sums[r] - x.offsets[r]) * load(scale + h * LANES));
  }
}

// y[r][0..BLOCK) = x[r] . w for block b of outputs, rows in tiles of nearly equal size. next: what is read after it.
template <class T> static void block(Rows<T> x, int rows, const Matrix& w, int b, const char* next, float* y) {
  const void* weight = w.block(b);
  const float* scale = (const float*)(w.scale + b * w.stride);
  int most = w.scale ? TILE8 : TILE, tiles = (rows + most - 1) / most;
  for (int t = 0; t < tiles; t++) {
    int size = (rows + tiles - t - 1) / (tiles - t);
    Ahead ahead{next + int64_t(x.size) * BLOCK * (w.scale ? 1 : sizeof(T)) / tiles * t, tiles};
    switch (size + (w.scale ? 100 : 0)) {
#define CASE(n) case n: if constexpr (n <= TILE) tile<T, n>(x.x, x.size, (const T*)weight, ahead, y); break;
#define CASE8(n) case 100 + n: if constexpr (n <= TILE8) tile8<n>(x, (const uint8_t*)weight, scale, ahead, y); break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
      CASE8(1) CASE8(2) CASE8(3) CASE8(4) CASE8(5) CASE8(6) CASE8(7) CASE8(8) CASE8(9) CASE8(10)
#undef CASE
#undef CASE8
    }
    x = x.from(size), y += size * BLOCK, rows -= size;
  }
}

// Room for rows in 8 bits.
template <class T> struct Rounder {
  std::vector<int8_t> bytes;
  std::vector<float> scales, offsets;
  Rounder(int64_t rows, int64_t size) : bytes(rows * size), scales(rows * size / GROUP), offsets(rows) {}

  Rows<T> operator()(const In<T>* x, int64_t size, int rows) {
    for (int r = 0; r < rows && !bytes.empty(); r++) {
      f32x total = {};
      for (int64_t at = r * size; at < (r + 1) * size; at += GROUP) {
        f32x largest = {};
        for (int h = 0; h < GROUP; h += LANES) {
          f32x a = load(x + at + h);
          a = a > -a ? a : -a, largest = a > largest ? a : largest;
        }
        float top = std::max(1e-20f, most(largest));
        scales[at / GROUP] = top / 127;
        for (int h = 0; h < GROUP; h += LANES) {
          f32x whole = nearest(load(x + at + h) * (127 / top));
          total += whole * (top / 127);
          i8x small = __builtin_convertvector(__builtin_convertvector(whole, i32x), i8x);
          memcpy(bytes.data() + at + h, &small, LANES);
        }
      }
      offsets[r] = OFFSET * sum(total);
    }
    return {x, size, bytes.data(), scales.data(), offsets.data()};
  }
};

struct Linear {  // down [rank, in] and up [out, rank] act on SAT rows only; sizes are padded to whole blocks
  Matrix weight, down, up;
  const void* bias;
  int64_t out, in, rank;
};

struct Layer {
  const void *norm_attention, *norm_mlp, *norm_q, *norm_k;
  Linear q, k, v, o, gate, up, down;
};

struct Model {
  int64_t layers, hidden, heads, kv_heads, dim, inner, vocabulary, positions, threads;
  float eps, scale;
  const float *cos, *sin;  // [positions, dim]
  const void* norm;
  Linear head;
  const Layer* layer;
  const void *embedding, *unembedding;  // [vocabulary, hidden] as they are, for drafting
  Linear draft_inner, draft_outer;             // the draft head, rank 0 and no weight where there is none
  float draft_eps;
};

struct Cache {  // of one sequence: keys [layers, kv_heads, T / LANES, dim / step, LANES, step], values [layers, kv_heads, T / step, dim, step]
  void *keys, *values;
  int64_t slots;
};

struct Sampling {
  double temperature, top_p;
  int64_t top_k;
};

struct Drafting {  // see native.py
  const void *states, *logits;
  const int64_t *parents, *ranks, *depths;
  double *tokens, *likely;
  int64_t nodes, sats, shortlist, index;
  uint64_t seed;
  Sampling sampling;
};

struct Pass {  // see native.py
  void *x, *states, *logits;
  const int64_t *positions, *slots, *sequences, *lengths;
  const uint8_t* within;
  int64_t caches, rows, sats, last;
};

// What the SAT rows add, low [SATs, rank], which outputs() multiplies by `up`: too little to share among threads.
template <class T>
static Rows<T> lower(const Linear& l, const Rows<T>& x, int sats, const char* next, float* y, In<T>* low, Rounder<T>& rounder) {
  for (int b = 0; b < (sats ? l.rank / BLOCK : 0); b++) {
    block<T>(x, sats, l.down, b, b + 1 < l.rank / BLOCK ? l.down.block(b + 1) : next, y);
    for (int r = 0; r < sats; r++)
      for (int c = 0; c < BLOCK; c += LANES) put<T>(low + r * l.rank + b * BLOCK + c, load(y + r * BLOCK + c));
  }
  return rounder(low, l.rank, l.rank ? sats : 0);
}

// Block b of a linear layer for all rows, the last `sats` of them with their update: y [rows, BLOCK].
template <class T>
static void outputs(const Linear& l, int b, const Rows<T>& x, int rows, int sats, const Rows<T>& low, const char* next, float* y,
                    float* more) {
  block<T>(x, rows, l.weight, b, next, y);
  if (l.bias)
    for (int r = 0; r < rows; r++)
      for (int h = 0; h < BLOCK; h += LANES)
        store(y + r * BLOCK + h, load(y + r * BLOCK + h) + load((const T*)l.bias + b * BLOCK + h));
  if (l.rank && sats) {
    block<T>(low, sats, l.up, b, next, more);
    float* to = y + (rows - sats) * BLOCK;
    for (int i = 0; i < sats * BLOCK; i += LANES) store(to + i, load(to + i) + load(more + i));
  }
}

template <class T, class X, class Y> static void norm(const X* x, const void* weight, int size, float eps, Y* y) {
  f32x squares = {};
  for (int i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
  float factor = 1.f / std::sqrt(sum(squares) / size + eps);
  for (int i = 0; i < size; i += LANES) put<T>(y + i, rounded<T>(load(x + i) * factor) * load((const T*)weight + i));
}

template <class T, class X> static void rotate(X* x, const float* cos, const float* sin, int dim) {
  for (int i = 0; i < dim / 2; i += LANES) {
    f32x a = load(x + i), b = load(x + dim / 2 + i);
    put<T>(x + i, rounded<T>(a * load(cos + i)) + rounded<T>(-b * load(sin + i)));
    put<T>(x + dim / 2 + i, rounded<T>(b * load(cos + dim / 2 + i)) + rounded<T>(a * load(sin + dim / 2 + i)));
  }
}

// ---- attention of one row, H query heads of one key/value head ----

template <class T, int H>
static void attend(const In<T>* q, int dim, const T* keys, const T* values, const int* own, int owned, int length, float scale,
                   float* scores, int64_t width, T* gathered, In<T>* out) {
  constexpr int S = Inner<T>::step;
  const int last = own[owned - 1] + 1, seen = length + owned;
  const int* other = own;  // the keys that don't lie where their position says: of a chain, none
  while (length < seen && *other == length) length++, other++;
  for (int t = 0; t < last; t += KEYS) {
    f32x a[H][4] = {};
    const T* k = keys + int64_t(t) * dim;
    for (int d = 0; d < dim; d += S) step(a, k + d * LANES, LANES * dim, q + d, dim);
    for (int h = 0; h < H; h++)
      for (int c = 0; c < 4; c++) store(scores + h * width + t + c * LANES, a[h][c] * scale);
  }
  int padded = (seen + LANES - 1) / LANES * LANES;
  for (int h = 0; h < H; h++) {
    float* s = scores + h * width;
    for (int j = length; j < seen; j++) s[j] = s[other[j - length]];  // own slots ascend: none is overwritten before it is read
    for (int j = seen; j < padded; j++) s[j] = -std::numeric_limits<float>::infinity();
    f32x top = load(s), total = {};
    for (int j = LANES; j < padded; j += LANES) top = load(s + j) > top ? load(s + j) : top;
    float highest = most(top);
    for (int j = 0; j < padded; j += LANES) store(s + j, exp16(load(s + j) - highest));
    for (int j = seen; j < padded; j++) s[j] = 0;
    for (int j = 0; j < padded; j += LANES) total += load(s + j);
    float factor = 1.f / sum(total);
    In<T>* p = (In<T>*)s;  // in place: what is written has been read
    for (int j = 0; j < padded; j += LANES) put<T>(p + j, load(s + j) * factor);
  }
  // Keys go S at a time: those before `whole` as they lie in the cache, the others gathered.
  int whole = length / S * S, rest = seen - whole;
  for (int j = 0; j < rest; j++) {
    int slot = whole + j < length ? whole + j : other[whole + j - length];
    const T* v = values + int64_t(slot) / S * S * dim + slot % S;
    T* to = gathered + j / S * S * dim + j % S;
    for (int d = 0; d < dim; d++) to[d * S] = v[d * S];
  }
  if (S == 2 && rest % 2)  // the last one's partner: nothing
    for (int d = 0; d < dim; d++) gathered[rest / S * S * dim + d * S + 1] = 0;
  auto weighted = [&](int d, auto chunks) {
    constexpr int C = decltype(chunks)::value;
    f32x a[H][C] = {};
    for (int j = 0; j < seen; j += S) {
      const T* v = (j < whole ? values + int64_t(j) * dim : gathered + int64_t(j - whole) * dim) + d * S;
      step(a, v, LANES * S, (const In<T>*)scores + j, width * sizeof(float) / sizeof(In<T>));
    }
    for (int h = 0; h < H; h++)
      for (int c = 0; c < C; c++) put<T>(out + h * dim + d + c * LANES, a[h][c]);
  };
  int d = 0;
  for (; d + 4 * LANES <= dim; d += 4 * LANES) weighted(d, std::integral_constant<int, 4>());
  for (; d < dim; d += 2 * LANES) weighted(d, std::integral_constant<int, 2>());
}

// What a member of a pass works in.
template <class T> struct Desk {
  std::vector<float> y, y2, more, scores;
  std::vector<In<T>> xn, low, low2;
  std::vector<T> gathered;
  Rounder<T> rows, few, few2;
  Desk(const Model& m, int64_t n, int64_t sats, int64_t rank, int64_t width)
      : y(n * BLOCK), y2(n * BLOCK), more(sats * BLOCK), scores(std::min<int64_t>(m.heads / m.kv_heads, 3) * width),
        xn(n * m.hidden), low(sats * rank), low2(sats * rank), gathered((n + Inner<T>::step) * m.dim),
        rows(in_8_bits(m) * n, std::max({m.hidden, m.inner, m.heads * m.dim})), few(in_8_bits(m) * sats, rank),
        few2(in_8_bits(m) * sats, rank) {}
  static int64_t in_8_bits(const Model& m) { return m.head.weight.scale ? 1 : 0; }
};

// The slots of a pass's own rows that each row sees: own[before[r]] .. own[before[r + 1] - 1], in ascending order.
struct Seen {
  std::vector<int> own, before;
  int64_t width = 0;  // the most slots that a sequence has
  Seen(const Model& m, const Cache* caches, const Pass& pass) : before(pass.rows + 1) {
    for (int64_t r = 0; r < pass.rows; r++) {
      int64_t sequence = pass.sequences[r];
      check(sequence >= 0 && sequence < pass.caches, "sequences: a row of a sequence that has no cache");
      const Cache& cache = caches[sequence];
      check(cache.slots % KEYS == 0, "cache: expected whole blocks of slots");
      check(pass.slots[r] >= 0 && pass.slots[r] < cache.slots, "slots: a row beyond the cache's end");
      check(pass.positions[r] >= 0 && pass.positions[r] < m.positions, "positions: a row beyond those that the model was loaded for");
      check(pass.lengths[r] >= 0 && pass.within[r * pass.rows + r], "within: every row must see itself");
      width = std::max(width, cache.slots);
      int64_t last = pass.lengths[r] - 1;
      for (int64_t j = 0; j < pass.rows; j++) {
        if (!pass.within[r * pass.rows + j]) continue;
        check(pass.sequences[j] == sequence && pass.slots[j] > last && pass.slots[j] < cache.slots,
              "within: expected rows of the same sequence, with slots that ascend from its length on");
        own.push_back(last = pass.slots[j]);
      }
      before[r + 1] = own.size();
    }
  }
};

template <class T> static void run(const Model& m, const Cache* caches, const Pass& pass) {
  constexpr int S = Inner<T>::step;
  check(pass.rows >= 1 && pass.sats >= 0 && pass.sats <= pass.rows && pass.last >= 0 && pass.last <= pass.rows,
        "rows: expected at least one, of which SATs and those with logits are some");
  const int n = pass.rows, sats = pass.sats, first = n - sats;
  const int width_q = m.heads * m.dim, width_kv = m.kv_heads * m.dim, group = m.heads / m.kv_heads;
  int64_t rank = 0;
  for (int i = 0; i < m.layers; i++)
    for (const Linear* l : {&m.layer[i].q, &m.layer[i].k, &m.layer[i].v, &m.layer[i].o, &m.layer[i].gate, &m.layer[i].up, &m.layer[i].down})
      rank = std::max(rank, l->rank);
  T* h = (T*)pass.x;
  std::vector<In<T>> q(n * width_q), mixed(n * width_q), mid(n * m.inner);
  std::vector<T> k(n * width_kv), v(n * width_kv);
  const Seen seen(m, caches, pass);
  std::vector<std::atomic<int>> taken(m.layers);  // attention's items, by whoever is free
  auto desk = [&] { return Desk<T>(m, n, sats, rank, seen.width); };
  together(m.threads, desk, [&](Member me, Desk<T>& mine) {
    auto &y = mine.y, &y2 = mine.y2, &more = mine.more, &scores = mine.scores;
    auto &xn = mine.xn, &low = mine.low, &low2 = mine.low2;
    auto& gathered = mine.gathered;
    auto &rows = mine.rows, &few = mine.few, &few2 = mine.few2;
    Rows<T> x{}, small{}, small2{};
    auto normed = [&](const void* weight) {  // every thread for itself: cheaper than waiting for each other
      for (int r = 0; r < n; r++) norm<T>(h + r * m.hidden, weight, m.hidden, m.eps, xn.data() + r * m.hidden);
      x = rows(xn.data(), m.hidden, n);
    };
    auto start = [&](const Linear& l) { return l.weight.block(me.begin(l.out / BLOCK)); };  // the thread's first block of outputs
    auto entry = [&](const Linear& l) { return sats && l.rank ? l.down.weight : start(l); };
    auto after = [&](const Linear& l, int b, const Linear& then) {  // what the thread reads after block b
      return b + 1 < me.end(l.out / BLOCK) ? l.weight.block(b + 1) : entry(then);
    };
    auto project = [&](const Linear& l, auto* to, const Linear& then) {
      small = lower<T>(l, x.from(first), sats, start(l), y.data(), low.data(), few);
      me.each(l.out / BLOCK, [&](int b) {
        outputs<T>(l, b, x, n, sats, small, after(l, b, then), y.data(), more.data());
        for (int r = 0; r < n; r++)
          for (int c = 0; c < BLOCK; c += LANES) put<T>(to + r * l.out + b * BLOCK + c, load(y.data() + r * BLOCK + c));
      });
    };
    auto add_to_h = [&](const Linear& l, const In<T>* from, const Linear& then) {
      x = rows(from, l.in, n);
      small = lower<T>(l, x.from(first), sats, start(l), y.data(), low.data(), few);
      me.each(l.out / BLOCK, [&](int b) {
        outputs<T>(l, b, x, n, sats, small, after(l, b, then), y.data(), more.data());
        for (int r = 0; r < n; r++)
          for (int c = 0; c < BLOCK; c += LANES) {
            T* to = h + r * m.hidden + b * BLOCK + c;
            store(to, load(to) + rounded<T>(load(y.data() + r * BLOCK + c)));
          }
      });
      me.meet();
    };
    for (int i = 0; i < m.layers; i++) {
      const Layer& layer = m.layer[i];
      normed(layer.norm_attention);
      project(layer.q, q.data(), layer.k);
      project(layer.k, k.data(), layer.v);
      project(layer.v, v.data(), layer.o);
      me.meet();
      me.each(n, [&](int r) {
        const float *cos = m.cos + pass.positions[r] * m.dim, *sin = m.sin + pass.positions[r] * m.dim;
        for (int a = 0; a < m.heads; a++) {
          In<T>* x = q.data() + r * width_q + a * m.dim;
          if (layer.norm_q) norm<T>(x, layer.norm_q, m.dim, m.eps, x);
          rotate<T>(x, cos, sin, m.dim);
        }
        const Cache& cache = caches[pass.sequences[r]];
        int64_t slot = pass.slots[r];
        for (int a = 0; a < m.kv_heads; a++) {
          T* x = k.data() + r * width_kv + a * m.dim;
          if (layer.norm_k) norm<T>(x, layer.norm_k, m.dim, m.eps, x);
          rotate<T>(x, cos, sin, m.dim);
          int64_t at = (i * m.kv_heads + a) * cache.slots * m.dim;
          T* to = (T*)cache.keys + at + slot / LANES * LANES * m.dim + slot % LANES * S;
          for (int d = 0; d < m.dim; d += S) memcpy(to + d * LANES, x + d, S * sizeof(T));
          T* value = (T*)cache.values + at + slot / S * S * m.dim + slot % S;
          for (int d = 0; d < m.dim; d++) value[d * S] = v[r * width_kv + a * m.dim + d];
        }
      });
      me.meet();
      for (int item; (item = taken[i]++) < n * int(m.kv_heads);) {
        int r = item / m.kv_heads, a = item % m.kv_heads;
        const Cache& cache = caches[pass.sequences[r]];
        int64_t at = (i * m.kv_heads + a) * cache.slots * m.dim;
        const T *keys = (const T*)cache.keys + at, *values = (const T*)cache.values + at;
        for (int b = 0; b < group; b += 3) {
          int64_t offset = int64_t(r) * width_q + (a * group + b) * m.dim;
          auto args = [&](auto heads) {
            attend<T, decltype(heads)::value>(q.data() + offset, m.dim, keys, values, seen.own.data() + seen.before[r],
                                              seen.before[r + 1] - seen.before[r], pass.lengths[r], m.scale, scores.data(),
                                              seen.width, gathered.data(), mixed.data() + offset);
          };
          if (group - b >= 3) args(std::integral_constant<int, 3>());
          else if (group - b == 2) args(std::integral_constant<int, 2>());
          else args(std::integral_constant<int, 1>());
        }
      }
      me.meet();
      add_to_h(layer.o, mixed.data(), layer.gate);
      normed(layer.norm_mlp);
      small = lower<T>(layer.gate, x.from(first), sats, entry(layer.up), y.data(), low.data(), few);
      small2 = lower<T>(layer.up, x.from(first), sats, start(layer.gate), y.data(), low2.data(), few2);
      me.each(m.inner / BLOCK, [&](int b) {
        outputs<T>(layer.gate, b, x, n, sats, small, layer.up.weight.block(b), y.data(), more.data());
        outputs<T>(layer.up, b, x, n, sats, small2, after(layer.gate, b, layer.down), y2.data(), more.data());
        for (int r = 0; r < n; r++)
          for (int c = 0; c < BLOCK; c += LANES) {
            f32x g = rounded<T>(load(y.data() + r * BLOCK + c)), u = rounded<T>(load(y2.data() + r * BLOCK + c));
            put<T>(mid.data() + r * m.inner + b * BLOCK + c, rounded<T>(g / (exp16(-g) + 1.f)) * u);
          }
      });
      me.meet();
      add_to_h(layer.down, mid.data(), i + 1 < m.layers ? m.layer[i + 1].q : m.head);
    }
    normed(m.norm);
    me.each(n * m.hidden / LANES, [&](int64_t i) { store((T*)pass.states + i * LANES, load(xn.data() + i * LANES)); });
    const int last = pass.last;  // logits of the last rows only
    x = x.from(n - last);
    me.each(last ? (m.vocabulary + BLOCK - 1) / BLOCK : 0, [&](int b) {
      outputs<T>(m.head, b, x, last, 0, small, after(m.head, b, m.layer[0].q), y.data(), more.data());
      int count = std::min<int64_t>(BLOCK, m.vocabulary - b * BLOCK);
      for (int r = 0; r < last; r++) {
        T part[BLOCK];
        for (int c = 0; c < BLOCK; c += LANES) store(part + c, load(y.data() + r * BLOCK + c));
        memcpy((T*)pass.logits + r * m.vocabulary + b * BLOCK, part, count * sizeof(T));
      }
    });
  });
}

// Keep rows at `from` slots as the slots length, length + 1, ..: the walk of a tree, made contiguous.
template <class T> static void move(const Model& m, const Cache& cache, int64_t length, const int64_t* from, int64_t count) {
  constexpr int S = Inner<T>::step;
  check(length >= 0 && length + count <= cache.slots, "rows: more than the cache has room for");
  for (int64_t j = 0; j < count; j++)
    check(from[j] >= length + j && from[j] < cache.slots && (!j || from[j] > from[j - 1]),
          "rows: expected those of the last pass, in ascending order");
  each_together(m.threads, m.layers * m.kv_heads, [&](int64_t i) {
    int64_t at = i * cache.slots * m.dim;
    T *keys = (T*)cache.keys + at, *values = (T*)cache.values + at;
    for (int64_t j = 0; j < count; j++) {
      int64_t to = length + j;
      if (from[j] == to) continue;
      for (int d = 0; d < m.dim; d += S)
        memcpy(keys + to / LANES * LANES * m.dim + d * LANES + to % LANES * S,
               keys + from[j] / LANES * LANES * m.dim + d * LANES + from[j] % LANES * S, S * sizeof(T));
      for (int d = 0; d < m.dim; d++)
        values[to / S * S * m.dim + d * S + to % S] = values[from[j] / S * S * m.dim + d * S + from[j] % S];
    }
  });
}

static inline float value(float x) { return x; }
static inline float value(bf16 x) { uint32_t u = uint32_t(x) << 16; float v; memcpy(&v, &u, 4); return v; }

// The `count` largest of a row, largest first; of equals the lower id first. What is no number counts as the least.
template <class T> static void largest_of(const T* row, int64_t size, int64_t count, int64_t* id, float* best) {
  int64_t held = 0;
  auto offer = [&](int64_t i, float v) {
    if (v != v) v = -std::numeric_limits<float>::infinity();
    if (held == count && !(v > best[held - 1])) return;
    int64_t j = held < count ? held++ : held - 1;
    for (; j > 0 && v > best[j - 1]; j--) best[j] = best[j - 1], id[j] = id[j - 1];
    best[j] = v, id[j] = i;
  };
  int64_t i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES) {
    f32x a = load(row + i), b = load(row + i + LANES), c = load(row + i + 2 * LANES), d = load(row + i + 3 * LANES);
    a = a > b ? a : b, c = c > d ? c : d, a = a > c ? a : c;
    bool any = held < count;
    if (!any) {
      i32x more = a > all(best[held - 1]);
      int64_t bits[sizeof more / 8];
      memcpy(bits, &more, sizeof more);
      for (int64_t part : bits) any |= part != 0;
    }
    if (any)
      for (int j = 0; j < 4 * LANES; j++) offer(i + j, value(row[i + j]));
  }
  for (; i < size; i++) offer(i, value(row[i]));
}

template <class T>
static void largest(const T* x, int64_t rows, int64_t size, int64_t count, int64_t* ids, float* values, int threads) {
  check(count >= 1 && count <= size, "count: expected 1 to the number of logits of a row");
  each_together(threads, rows, [&](int64_t r) { largest_of(x + r * size, size, count, ids + r * count, values + r * count); });
}

// ---- choosing tokens: sampling.py says how ----

static uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Gumbel noise of the tokens at one emitted index: sampling.gumbel_noise.
struct Noise {
  static constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15u;
  uint64_t row;
  Noise(uint64_t seed, int64_t index) : row(mix(mix(seed) + (index + 1) * GOLDEN)) {}
  uint64_t bits(int64_t token) const { return mix(row + (token + 1) * GOLDEN) >> 12; }
  static double of(uint64_t bits) { return -std::log(-std::log((bits + 0.5) / (uint64_t(1) << 52))); }
  double operator()(int64_t token) const { return of(bits(token)); }
};

// The token with the most of log p + noise among all. -log(-log u) <= -log(1 - u) <= log 2 * the zeros that 1 - u begins with: so
// few tokens need a logarithm.
template <class T> static int64_t sampled(const T* x, int64_t size, const Sampling& s, const Noise& noise) {
  constexpr int SOME = 64;
  constexpr uint64_t ONES = (uint64_t(1) << 52) - 1;
  double best = -std::numeric_limits<double>::infinity();
  int64_t token = 0;
  for (int64_t i = 0; i < size; i += SOME) {
    const int count = std::min<int64_t>(SOME, size - i);
    uint64_t bits[SOME], exponents[SOME];
    double rest[SOME], most[SOME];
    for (int j = 0; j < SOME; j++) bits[j] = noise.bits(i + j);
    for (int j = 0; j < SOME; j++) rest[j] = double(int64_t(bits[j] ^ ONES));
    memcpy(exponents, rest, sizeof rest);
    for (int j = 0; j < count; j++)  // 1075 - its exponent field: how many zeros
      most[j] = value(x[i + j]) * (1 / s.temperature) + (1075.001 - double(int64_t(exponents[j] >> 52))) * 0.6931471805599454;
    for (int j = 0; j < count; j++) {
      if (most[j] <= best) continue;
      double score = value(x[i + j]) / s.temperature + Noise::of(bits[j]);
      if (score > best) best = score, token = i + j;
    }
  }
  return token;
}

// Columns of a shortlist, best first, and what it takes to put them in order.
struct Ranking {
  std::vector<int> order;
  std::vector<float> scaled;
  std::vector<double> noisy;
  explicit Ranking(int64_t size) : order(size), scaled(size), noisy(size) {}

  // By score; or by log p + noise among what top-k and top-p leave, and behind them by score. Columns are in order of their
  // ids: of equal scores those with the lower ids are the first that top-p drops (sampling.py says why).
  // total: what exp(score / temperature), as a share of the largest one, is in all; 0: in the columns that top-k leaves.
  void rank(const float* score, const int64_t* ids, const Noise& noise, const Sampling& s, double total) {
    const int size = order.size();
    const float temperature = s.temperature;
    for (int c = 0; c < size; c++) {
      order[c] = s.temperature ? size - 1 - c : c;
      scaled[c] = s.temperature ? score[c] / temperature : score[c];
      if (scaled[c] != scaled[c]) scaled[c] = -std::numeric_limits<float>::infinity();
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scaled[a] > scaled[b]; });
    if (!s.temperature) return;
    const int kept = left(s, total);
    for (int c = 0; c < kept; c++) noisy[order[c]] = scaled[order[c]] + noise(ids[order[c]]);
    std::stable_sort(order.begin(), order.begin() + kept, [&](int a, int b) { return noisy[a] > noisy[b]; });
  }

 private:
  int left(const Sampling& s, double total) const {  // by the filters, of the columns in order of their scores
    int64_t kept = order.size();
    if (s.top_k && s.top_k < kept)
      while (scaled[order[kept - 1]] < scaled[order[s.top_k - 1]]) kept--;
    if (s.top_p == 1) return kept;
    auto share = [&](int c) { return std::exp(double(scaled[order[c]] - scaled[order[0]])); };
    for (int c = 0, all = total ? 0 : kept; c < all; c++) total += share(c);
    double before = 0;
    for (int c = 0; c < kept; c++) {
      if (c && before >= s.top_p * total) return c;
      before += share(c);
    }
    return kept;
  }
};

// The tokens that top-k leaves, and their logits, in order of their ids: all that are no less than the k-th, once divided.
template <class T>
static void not_below(const T* x, int64_t size, const Sampling& s, std::vector<int64_t>& ids, std::vector<float>& score) {
  std::vector<int64_t> first(s.top_k);
  std::vector<float> best(s.top_k);
  largest_of(x, size, s.top_k, first.data(), best.data());
  const float temperature = s.temperature, least = best.back() / temperature;
  auto offer = [&](int64_t i, float v) {
    if (v / temperature >= least && v > -std::numeric_limits<float>::infinity()) ids.push_back(i), score.push_back(v);
  };
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    i32x more = load(x + i) / temperature >= all(least);
    int64_t bits[sizeof more / 8], any = 0;
    memcpy(bits, &more, sizeof more);
    for (int64_t part : bits) any |= part;
    for (int j = 0; any && j < LANES; j++) offer(i + j, value(x[i + j]));
  }
  for (; i < size; i++) offer(i, value(x[i]));
}

// The tokens that top-p of the whole vocabulary can leave, and their logits. Returns `total` for Ranking.
template <class T>
static double likely(const T* x, int64_t size, const Sampling& s, std::vector<int64_t>& ids, std::vector<float>& score) {
  const float temperature = s.temperature;
  float most = -std::numeric_limits<float>::infinity();
  std::vector<float> share((size + LANES - 1) / LANES * LANES, most);
  for (int64_t i = 0; i < size; i++) share[i] = value(x[i]) / temperature, most = std::max(most, share[i]);
  double total = 0;
  for (size_t i = 0; i < share.size(); i += LANES) {
    f32x e = exp16(load(share.data() + i) - most);
    store(share.data() + i, e), total += sum(e);
  }
  double least = (1 - s.top_p) * total / size;  // tokens of less have no more than 1 - top_p together: the others suffice
  for (int64_t i = 0; i < size; i++)
    if (!(share[i] < 0.99 * least)) ids.push_back(i), score.push_back(value(x[i]));
  return total;
}

// The next token of each row of logits: argmax of log p + noise among what the filters leave.
template <class T>
static void choose(const T* x, int64_t rows, int64_t size, const int64_t* index, const uint64_t* seeds, const Sampling& s,
                   int64_t* chosen, int threads) {
  check(size >= 1, "logits: expected at least one a row");
  check(s.temperature > 0 && s.top_p > 0 && s.top_p <= 1 && s.top_k >= 0, "sampling: a setting out of range");
  each_together(threads, rows, [&](int64_t r) {
    const T* row = x + r * size;
    Noise noise(seeds[r], index[r]);
    const bool few = s.top_k && s.top_k < size;
    if (!few && s.top_p == 1) return void(chosen[r] = sampled(row, size, s, noise));
    std::vector<int64_t> ids;
    std::vector<float> score;
    double total = 0;
    if (few) not_below(row, size, s, ids, score);
    else total = likely(row, size, s, ids, score);
    if (ids.empty()) return void(chosen[r] = 0);  // no logit is a number
    Ranking ranking(ids.size());
    ranking.rank(score.data(), ids.data(), noise, s, total);
    chosen[r] = ids[ranking.order[0]];
  });
}

// Depth by depth: all nodes of one go through the draft head together, as its weights take longer to read than to use.
template <class T> static void draft(const Model& m, const Drafting& d) {
  const int hidden = m.hidden, inner = m.draft_inner.weight.weight ? m.draft_inner.out : 0, n = d.shortlist;
  check(d.nodes >= 1 && n >= 1 && n <= m.vocabulary, "shortlist: expected 1 to the number of logits of a row");
  check(d.tokens[0] >= 0 && d.tokens[0] < m.vocabulary, "x: a token that is not in the vocabulary");
  check(d.depths[0] == 0, "tree: its root must be at depth 0");
  for (int64_t child = 1; child < d.nodes; child++) {
    int64_t parent = d.parents[child];
    check(parent >= 0 && parent < child && d.depths[child] == d.depths[parent] + 1, "tree: expected parents before children");
    check(d.depths[child] <= d.sats, "tree: deeper than there are SATs");
    check(d.ranks[child] >= 0 && d.ranks[child] < n, "tree: wider than the shortlist");
  }
  std::vector<int64_t> ids(d.sats * n);  // the shortlists
  std::vector<float> scores(d.sats * n);
  std::vector<std::vector<int>> levels;  // by depth: the nodes with children
  size_t most = 0;
  for (int child = 1; child < d.nodes; child++) {
    int node = d.parents[child], depth = d.depths[node];
    levels.resize(std::max<size_t>(levels.size(), depth + 1));
    auto& level = levels[depth];
    if (std::find(level.begin(), level.end(), node) == level.end()) level.push_back(node);
    most = std::max(most, level.size());
  }
  std::vector<In<T>> both(most * 2 * hidden), middle(most * inner), moves(most * hidden);
  std::vector<T> ones(hidden);
  for (int i = 0; i < hidden; i += LANES) store(ones.data() + i, all(1.f));
  std::vector<std::vector<float>> score(most, std::vector<float>(n));
  struct Desk {
    std::vector<float> y;
    Ranking ranking;
  };
  auto desk = [&] { return Desk{std::vector<float>(most * BLOCK), Ranking(n)}; };
  together(m.threads, desk, [&](Member me, Desk& mine) {
    auto& y = mine.y;
    const auto& order = mine.ranking.order;
    me.each(d.sats, [&](int64_t i) {
      largest_of((const T*)d.logits + i * m.vocabulary, m.vocabulary, n, ids.data() + i * n, scores.data() + i * n);
    });
    me.meet();
    for (size_t sat = 0; sat < levels.size(); sat++) {
      const auto& level = levels[sat];
      const int rows = level.size();
      if (inner) {
        me.each(rows, [&](int r) {
          In<T>* x = both.data() + int64_t(r) * 2 * hidden;
          norm<T>((const T*)d.states + int64_t(sat) * hidden, ones.data(), hidden, m.draft_eps, x);
          norm<T>((const T*)m.embedding + int64_t(d.tokens[level[r]]) * hidden, ones.data(), hidden, m.draft_eps, x + hidden);
        });
        me.meet();
        me.each(inner / BLOCK, [&](int b) {
          block<T>({both.data(), 2 * hidden}, rows, m.draft_inner.weight, b, m.draft_inner.weight.block(b + 1), y.data());
          for (int r = 0; r < rows; r++)
            for (int c = 0; c < BLOCK; c += LANES) {
              f32x g = rounded<T>(load(y.data() + r * BLOCK + c));
              put<T>(middle.data() + r * inner + b * BLOCK + c, g / (exp16(-g) + 1.f));
            }
        });
        me.meet();
        me.each(hidden / BLOCK, [&](int b) {
          block<T>({middle.data(), inner}, rows, m.draft_outer.weight, b, m.draft_outer.weight.block(b + 1), y.data());
          for (int r = 0; r < rows; r++)
            for (int c = 0; c < BLOCK; c += LANES) put<T>(moves.data() + r * hidden + b * BLOCK + c, load(y.data() + r * BLOCK + c));
        });
        me.meet();
      }
      me.each(n, [&](int c) {
        const T* row = (const T*)m.unembedding + ids[sat * n + c] * hidden;
        for (int r = 0; r < rows; r++) {
          f32x s = {};
          for (int i = 0; i < hidden && inner; i += LANES) s += load(row + i) * load(moves.data() + r * hidden + i);
          score[r][c] = scores[sat * n + c] + sum(s);
        }
      });
      me.meet();
      me.each(rows, [&](int r) {
        mine.ranking.rank(score[r].data(), ids.data() + sat * n, Noise(d.seed, d.index + sat), d.sampling, 0);
        float best = *std::max_element(score[r].begin(), score[r].end()), total = 0;
        for (int c = 0; c < n; c++) total += std::exp(score[r][c] - best);
        for (int child = level[r] + 1; child < d.nodes; child++)
          if (d.parents[child] == level[r]) {
            int column = order[d.ranks[child]];
            d.tokens[child] = ids[sat * n + column];
            d.likely[child] = std::exp(score[r][column] - best) / total;
          }
      });
      me.meet();
    }
  });
}

// Each returns nothing, or why it could not be done.
extern "C" {
int sdsat_lanes() { return LANES; }
const char* sdsat_draft(const Model* m, const Drafting* d, int is_bf16) {
  return guarded([&] { is_bf16 ? draft<bf16>(*m, *d) : draft<float>(*m, *d); });
}
const char* sdsat_pass(const Model* m, const Cache* caches, const Pass* pass, int is_bf16) {
  return guarded([&] { is_bf16 ? run<bf16>(*m, caches, *pass) : run<float>(*m, caches, *pass); });
}
const char* sdsat_move(const Model* m, const Cache* cache, int64_t length, const int64_t* from, int64_t count, int is_bf16) {
  return guarded([&] {
    is_bf16 ? move<bf16>(*m, *cache, length, from, count) : move<float>(*m, *cache, length, from, count);
  });
}
const char* sdsat_choose(const void* x, int64_t rows, int64_t size, const int64_t* index, const uint64_t* seeds, const Sampling* s,
                         int64_t* chosen, int threads, int is_bf16) {
  return guarded([&] {
    is_bf16 ? choose((const bf16*)x, rows, size, index, seeds, *s, chosen, threads)
            : choose((const float*)x, rows, size, index, seeds, *s, chosen, threads);
  });
}
const char* sdsat_largest(const void* x, int64_t rows, int64_t size, int64_t count, int64_t* ids, float* values, int threads,
                          int is_bf16) {
  return guarded([&] {
    is_bf16 ? largest((const bf16*)x, rows, size, count, ids, values, threads)
            : largest((const float*)x, rows, size, count, ids, values, threads);
  });
}
}
