// Attention: of one row and the query heads of one key/value head, and the layer around it.
//
// Fast: up to HEADS_AT_ONCE query heads read each key and value once; threads take rows and heads
// one by one, so that nobody waits for who has the long ones. Exact: scores are put in order of
// position before anything is added up, and every row sees its own keys only. So a token verified
// in a draft tree gets the bits that it gets alone.
#pragma once
#include <limits>

#include "cache.h"
#include "kernels.h"
#include "pass_state.h"

// scores [H, width] of the slots before `end`: (q [H, dim] . keys) * scale.
template <class T, int H>
static inline void score_slots(const Input<T>* q, const HeadCache<T>& cache, int end, float scale,
                               float* scores, int64_t width) {
  for (int t = 0; t < end; t += KEY_BLOCK) {
    f32x a[H][KEY_VECTORS] = {};
    const T* keys = cache.keys + int64_t(t) * cache.dim;
    for (int d = 0; d < cache.dim; d += STEP<T>)
      add_step(a, keys + d * LANES, LANES * cache.dim, q + d, cache.dim);
    for (int h = 0; h < H; h++)
      for (int c = 0; c < KEY_VECTORS; c++)
        store(scores + h * width + t + c * LANES, a[h][c] * scale);
  }
}

// From the scores of the slots, the weights of the keys in order of position, in place. Up to a
// whole vector there are zeros behind them.
template <class T> static inline void softmax(float* s, const VisibleKeys& keys) {
  const int seen = keys.count;
  const int padded = (seen + LANES - 1) / LANES * LANES;
  for (int j = keys.in_place; j < seen; j++)
    s[j] = s[keys.others[j - keys.in_place]];  // slots ascend: each is read before it is written
  for (int j = seen; j < padded; j++) s[j] = -std::numeric_limits<float>::infinity();
  f32x top = load(s);
  for (int j = LANES; j < padded; j += LANES) top = load(s + j) > top ? load(s + j) : top;
  const float highest = largest_lane(top);
  for (int j = 0; j < padded; j += LANES) store(s + j, exponential(load(s + j) - highest));
  for (int j = seen; j < padded; j++) s[j] = 0;
  f32x total = {};
  for (int j = 0; j < padded; j += LANES) total += load(s + j);
  const float factor = 1.f / sum(total);
  Input<T>* weights = (Input<T>*)s;  // which may be narrower: what is overwritten has been read
  for (int j = 0; j < padded; j += LANES) store_nearest<T>(weights + j, load(s + j) * factor);
}

// The values of keys `whole` and after, in order of position, laid out as a cache's values are.
template <class T>
static inline void gather_values(const HeadCache<T>& cache, const VisibleKeys& keys, int whole,
                                 T* gathered) {
  constexpr int S = STEP<T>;
  const int dim = cache.dim;
  const int rest = keys.count - whole;
  for (int j = 0; j < rest; j++) {
    const int key = whole + j;
    const T* v = cache.value(key < keys.in_place ? key : keys.others[key - keys.in_place]);
    T* to = gathered + j / S * S * dim + j % S;
    for (int d = 0; d < dim; d++) to[d * S] = v[d * S];
  }
  if (S == 2 && rest % 2)  // the last one's partner: nothing
    for (int d = 0; d < dim; d++) gathered[rest / S * S * dim + d * S + 1] = 0;
}

// out [H, dim] from element d on, C vectors: the sum of values times weights [H, width].
template <class T, int H, int C>
static inline void add_values(const HeadCache<T>& cache, const T* gathered, int whole, int seen,
                              const Input<T>* weights, int64_t width, int d, Input<T>* out) {
  constexpr int S = STEP<T>;
  const int64_t dim = cache.dim;
  f32x a[H][C] = {};
  for (int j = 0; j < seen; j += S) {
    const T* v = j < whole ? cache.values + j * dim : gathered + (j - whole) * dim;
    add_step(a, v + d * S, LANES * S, weights + j, width);
  }
  for (int h = 0; h < H; h++)
    for (int c = 0; c < C; c++) store_nearest<T>(out + h * dim + d + c * LANES, a[h][c]);
}

// out [H, dim]: what H query heads q [H, dim] of one row get from the keys that it sees.
template <class T, int H>
static void attend(PassThread<T>& thread, const HeadCache<T>& cache, const VisibleKeys& keys,
                   const Input<T>* q, Input<T>* out) {
  const int64_t width = thread.state.visible.width;
  float* scores = thread.scores.data();
  score_slots<T, H>(q, cache, keys.end, thread.state.model.scale, scores, width);
  for (int h = 0; h < H; h++) softmax<T>(scores + h * width, keys);
  // Values go STEP at a time: those before `whole` as they lie in the cache, the others gathered.
  const int whole = keys.in_place / STEP<T> * STEP<T>;
  gather_values(cache, keys, whole, thread.gathered.data());
  const Input<T>* weights = (const Input<T>*)scores;
  const int64_t apart = width * sizeof(float) / sizeof(Input<T>);
  auto add = [&](auto vectors, int d) {
    add_values<T, H, decltype(vectors)::value>(cache, thread.gathered.data(), whole, keys.count,
                                               weights, apart, d, out);
  };
  int d = 0;
  for (; d + 4 * LANES <= cache.dim; d += 4 * LANES) add(std::integral_constant<int, 4>(), d);
  for (; d < cache.dim; d += 2 * LANES) add(std::integral_constant<int, 2>(), d);
}

// Turn a row's queries to its position.
template <class T> static void rotate_queries(PassState<T>& s, const Layer& layer, int row) {
  const Model& m = s.model;
  const int64_t at = s.pass.positions[row] * m.dim;
  for (int a = 0; a < m.heads; a++) {
    Input<T>* q = s.queries.data() + row * s.query_width + a * m.dim;
    if (layer.norm_q) rms_norm<T>(q, layer.norm_q, m.dim, m.eps, q);
    rotate<T>(q, m.cos + at, m.sin + at, m.dim);
  }
}

// Turn a row's keys to its position, and put keys and values into its cache.
template <class T> static void keep(PassState<T>& s, int layer_number, int row) {
  const Model& m = s.model;
  const Layer& layer = m.layer[layer_number];
  const int64_t at = s.pass.positions[row] * m.dim;
  for (int a = 0; a < m.kv_heads; a++) {
    T* k = s.keys.data() + row * s.key_width + a * m.dim;
    if (layer.norm_k) rms_norm<T>(k, layer.norm_k, m.dim, m.eps, k);
    rotate<T>(k, m.cos + at, m.sin + at, m.dim);
    const T* v = s.values.data() + row * s.key_width + a * m.dim;
    const Cache& cache = s.caches[s.pass.sequences[row]];
    HeadCache<T>(m, cache, layer_number * m.kv_heads + a).write(s.pass.slots[row], k, v);
  }
}

// All query heads of one row and key/value head.
template <class T>
static void attend_row(PassThread<T>& thread, int layer_number, int row, int kv_head) {
  PassState<T>& s = thread.state;
  const Model& m = s.model;
  const int group = m.heads / m.kv_heads;
  const VisibleKeys keys = s.visible.of(row);
  const Cache& cache = s.caches[s.pass.sequences[row]];
  const HeadCache<T> head(m, cache, layer_number * m.kv_heads + kv_head);
  for (int first = 0; first < group; first += HEADS_AT_ONCE) {
    const int64_t at = int64_t(row) * s.query_width + (kv_head * group + first) * m.dim;
    with_constant<HEADS_AT_ONCE>(std::min(HEADS_AT_ONCE, group - first), [&](auto heads) {
      attend<T, decltype(heads)::value>(thread, head, keys, s.queries.data() + at,
                                        s.attended.data() + at);
    });
  }
}

// Keys and values of all rows, into their caches; and their queries, where they attend.
template <class T> static void read_rows(PassThread<T>& thread, int number, bool attends) {
  PassState<T>& s = thread.state;
  const Layer& layer = s.model.layer[number];
  const Rows<T> x = thread.normed_residual(layer.norm_attention);
  if (attends) thread.linear.project(layer.q, x, s.queries.data(), layer.k);
  thread.linear.project(layer.k, x, s.keys.data(), layer.v);
  thread.linear.project(layer.v, x, s.values.data(), layer.o);
  thread.worker.meet();
  thread.worker.each(s.rows, [&](int row) {
    if (attends) rotate_queries(s, layer, row);
    keep(s, number, row);
  });
  thread.worker.meet();
}

// residual += o(attention(norm(residual))).
template <class T> static void attention_layer(PassThread<T>& thread, int number) {
  PassState<T>& s = thread.state;
  const Layer& layer = s.model.layer[number];
  read_rows(thread, number, true);
  const int kv_heads = s.model.kv_heads;
  for (int item; (item = s.taken[number]++) < s.rows * kv_heads;)
    attend_row(thread, number, item / kv_heads, item % kv_heads);
  thread.worker.meet();
  thread.add_to_residual(layer.o, s.attended.data(), layer.gate);
}
