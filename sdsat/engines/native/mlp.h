// The MLP of a layer: down(silu(gate) * up).
//
// Fast: a block of gate and the same block of up lie beside each other in memory, are read by the
// same thread in turns, and are multiplied before either leaves the processor's caches. Exact:
// rounded where transformers' modules round: gate, up, silu(gate), and their product.
#pragma once
#include "pass_state.h"

// gated [rows, inner] = silu(gate(x)) * up(x).
template <class T>
static void gate_and_up(PassThread<T>& thread, const Layer& layer, const Rows<T>& x) {
  PassState<T>& s = thread.state;
  auto multiply = [&](int64_t b, const float* gate, const float* up) {
    each_vector(s.rows, [&](int r, int c) {
      f32x g = nearest<T>(load(gate + r * BLOCK + c));
      f32x u = nearest<T>(load(up + r * BLOCK + c));
      store_nearest<T>(s.gated.data() + r * s.model.inner + b * BLOCK + c,
                       nearest<T>(silu(g)) * u);
    });
  };
  thread.linear.each_pair_of_blocks(layer.gate, layer.up, x, layer.down, multiply);
}

// residual += down(gated(norm(residual))). then: the layer after.
template <class T>
static void mlp_layer(PassThread<T>& thread, const Layer& layer, const Linear& then) {
  const Rows<T> x = thread.normed_residual(layer.norm_mlp);
  gate_and_up(thread, layer, x);
  thread.worker.meet();
  thread.add_to_residual(layer.down, thread.state.gated.data(), then);
}
