// The output layer: the last norm, whose rows are the pass's states, and the logits.
//
// Fast: logits of the last rows only, as the others are wanted of nobody; the vocabulary is shared
// among the threads by blocks. Exact: as any linear layer.
#pragma once
#include "pass_state.h"

template <class T> static void output_layer(PassThread<T>& thread) {
  const PassState<T>& s = thread.state;
  const Model& m = s.model;
  const Pass& pass = s.pass;
  const Rows<T> x = thread.normed_residual(m.norm);
  thread.worker.each(s.rows * m.hidden / LANES, [&](int64_t i) {
    store((T*)pass.states + i * LANES, load(x.values + i * LANES));
  });
  const int last = pass.last;
  const int64_t blocks = last ? (m.vocabulary + BLOCK - 1) / BLOCK : 0;
  auto keep = [&](int64_t b, const float* y) {
    const int count = std::min<int64_t>(BLOCK, m.vocabulary - b * BLOCK);  // the rest is padding
    for (int r = 0; r < last; r++) {
      T part[BLOCK];
      for (int c = 0; c < BLOCK; c += LANES) store(part + c, load(y + r * BLOCK + c));
      memcpy((T*)pass.logits + r * m.vocabulary + b * BLOCK, part, count * sizeof(T));
    }
  };
  thread.linear.each_block_of_head(m.head, blocks, x.from(s.rows - last), last, m.layer[0].q, keep);
}
