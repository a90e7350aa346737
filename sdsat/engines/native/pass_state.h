// The state of a pass: what its threads share, and what each has for itself.
//
// Fast: all memory is allocated before the first layer, and a thread's own by the thread itself.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "cache.h"
#include "linear.h"
#include "norms.h"
#include "structs.h"
#include "threads.h"

constexpr int HEADS_AT_ONCE = 3;  // query heads of one key/value head that attend together

// The highest rank of an adapter in any layer.
static int64_t highest_rank(const Model& m) {
  int64_t rank = 0;
  for (int i = 0; i < m.layers; i++) {
    const Layer& l = m.layer[i];
    rank = std::max({rank, l.q.rank, l.k.rank, l.v.rank, l.o.rank, l.gate.rank, l.up.rank,
                     l.down.rank});
  }
  return rank;
}

// What the threads of a pass share.
template <class T> struct PassState {
  const Model& model;
  const Cache* caches;
  const Pass& pass;
  const int rows, sats;
  const int64_t query_width, key_width;  // elements of all heads' queries, and keys, of a row
  const int64_t rank;
  const Visibility visible;
  T* residual;                          // [rows, hidden], the residual stream: pass.x, in place
  std::vector<Input<T>> queries;        // [rows, query_width]
  std::vector<T> keys, values;          // [rows, key_width]
  std::vector<Input<T>> attended;       // [rows, query_width]
  std::vector<Input<T>> gated;          // [rows, inner]
  std::vector<std::atomic<int>> taken;  // [layers]: items of attention that some thread has taken

  PassState(const Model& model, const Cache* caches, const Pass& pass)
      : model(model), caches(caches), pass(pass), rows(pass.rows), sats(pass.sats),
        query_width(model.heads * model.dim), key_width(model.kv_heads * model.dim),
        rank(highest_rank(model)), visible(caches, pass), residual((T*)pass.x),
        queries(rows * query_width), keys(rows * key_width), values(rows * key_width),
        attended(rows * query_width), gated(rows * model.inner), taken(model.layers) {}
};

// What one thread of a pass has for itself.
template <class T> class PassThread {
 public:
  Worker& worker;
  PassState<T>& state;
  LinearShare<T> linear;
  std::vector<float> scores;  // [HEADS_AT_ONCE, slots]
  std::vector<T> gathered;    // [rows + STEP, dim]: values that don't lie where their position says

  PassThread(Worker& worker, PassState<T>& state) : PassThread(worker, state, state.model) {}

  // The residual stream, normed: by every thread for itself, which is cheaper than to wait for each
  // other. Valid until the next call of this or add_to_residual().
  Rows<T> normed_residual(const void* weight) {
    const int64_t size = state.model.hidden;
    const float eps = state.model.eps;
    for (int r = 0; r < state.rows; r++)
      rms_norm<T>(state.residual + r * size, weight, size, eps, normed.data() + r * size);
    return rows_of(normed.data(), size);
  }

  // residual += l(x [rows, in]). then: the layer after.
  void add_to_residual(const Linear& l, const Input<T>* x, const Linear& then) {
    linear.each_block(l, rows_of(x, l.in), then, [&](int64_t b, const float* y) {
      each_vector(state.rows, [&](int r, int c) {
        T* to = state.residual + r * state.model.hidden + b * BLOCK + c;
        store(to, load(to) + nearest<T>(load(y + r * BLOCK + c)));
      });
    });
    worker.meet();
  }

 private:
  PassThread(Worker& worker, PassState<T>& state, const Model& m)
      : worker(worker), state(state),
        linear(worker, state.rows, state.sats, state.rank, m.in_8_bits),
        scores(std::min<int64_t>(m.heads / m.kv_heads, HEADS_AT_ONCE) * state.visible.width),
        gathered((state.rows + STEP<T>) * m.dim), normed(state.rows * m.hidden),
        quantize(m.in_8_bits ? state.rows : 0, std::max({m.hidden, m.inner, m.heads * m.dim})) {}

  Rows<T> rows_of(const Input<T>* x, int64_t size) {
    return {x, size, quantize(x, size, state.rows)};
  }

  std::vector<Input<T>> normed;  // [rows, hidden]
  Quantizer quantize;
};
