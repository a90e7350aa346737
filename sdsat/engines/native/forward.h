// A pass of the model over all layers.
//
// Fast: every weight is read once, at the memory's pace, and no work between two layers is left to
// Python. Exact: a row's result has the same bits whatever rows stand beside it and wherever its
// context lies in the cache (kernels.h, cache.h, attention.h say why). So drafting is lossless in
// bfloat16 too: a token verified in a tree gets the bits that plain decoding gives it.
#pragma once
#include "attention.h"
#include "mlp.h"
#include "output_layer.h"
#include "pass_state.h"

template <class T> static void forward(const Model& model, const Cache* caches, const Pass& pass) {
  PassState<T> state(model, caches, pass);
  auto make = [&](Worker& worker) { return PassThread<T>(worker, state); };
  parallel(model.threads, make, [&](PassThread<T>& thread) {
    // A prompt that is read leaves keys and values: of the last layer nothing else is wanted.
    const int whole = pass.states ? model.layers : model.layers - 1;
    for (int i = 0; i < whole; i++) {
      const Linear& then = i + 1 < model.layers ? model.layer[i + 1].q : model.head;
      attention_layer(thread, i);
      mlp_layer(thread, model.layer[i], then);
    }
    pass.states ? output_layer(thread) : read_rows(thread, whole, false);
  });
}
