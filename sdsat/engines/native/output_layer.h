// The output layer: the last norm, whose rows are the pass's states, and the logits.
//
// Fast: SATs' logits are over the draft vocabulary; tokens are shared among the threads by blocks.
// Exact: as any linear layer.
#pragma once
#include "pass_state.h"

// to [count, tokens] = head(x), of a layer whose last block is filled up. then: the layer after.
template <class T>
static void logits_by(PassThread<T>& thread, const Linear& head, int64_t tokens, const Rows<T>& x,
                      int count, void* to, const Linear& then) {
  const int64_t blocks = count ? (tokens + BLOCK - 1) / BLOCK : 0;
  auto keep = [&](int64_t b, const float* y) {
    const int wanted = std::min<int64_t>(BLOCK, tokens - b * BLOCK);  // the rest is padding
    for (int r = 0; r < count; r++) {
      T part[BLOCK];
      for (int c = 0; c < BLOCK; c += LANES) store(part + c, load(y + r * BLOCK + c));
      memcpy((T*)to + r * tokens + b * BLOCK, part, wanted * sizeof(T));
    }
  };
  thread.linear.each_block_of_head(head, blocks, x, count, then, keep);
}

template <class T> static void output_layer(PassThread<T>& thread) {
  const PassState<T>& s = thread.state;
  const Model& m = s.model;
  const Pass& pass = s.pass;
  const Rows<T> x = thread.normed_residual(m.norm);
  thread.worker.each(s.rows * m.hidden / LANES, [&](int64_t i) {
    store((T*)pass.states + i * LANES, load(x.values + i * LANES));
  });
  const int apart = m.draft_head.weight.weight ? s.sats : 0;  // rows over the draft vocabulary
  const Linear& then = apart ? m.draft_head : m.layer[0].q;
  logits_by(thread, m.head, m.vocabulary, x, s.rows - apart, pass.logits, then);
  logits_by(thread, m.draft_head, m.draft_tokens, x.from(s.rows - apart), apart, pass.sat_logits,
            m.layer[0].q);
}
