// Drafting: tokens for a tree of drafts, from the SATs' states and logits through the draft head.
//
// The draft head moves a SAT's logits by what the token drafted before it says: moves =
// outer(silu(inner([norm(state), norm(embedding of that token)]))), and a candidate's score is its
// logit + its row of the unembedding . moves (models/head.py is the reference). Fast: depth by
// depth, all nodes of one together, as the head's weights take longer to read than to use; and a
// shortlist of each SAT's candidates instead of the vocabulary. Exact by itself it need not be:
// drafts are verified.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "linear.h"
#include "norms.h"
#include "sampling.h"
#include "structs.h"
#include "threads.h"

// By depth: the nodes that have children, which a SAT's candidates fill.
static std::vector<std::vector<int>> parents_by_depth(const Drafting& d) {
  std::vector<std::vector<int>> levels;
  for (int child = 1; child < d.nodes; child++) {
    const int node = d.parents[child];
    levels.resize(std::max<size_t>(levels.size(), d.depths[node] + 1));
    auto& level = levels[d.depths[node]];
    if (std::find(level.begin(), level.end(), node) == level.end()) level.push_back(node);
  }
  return levels;
}

// What the threads of a draft share.
template <class T> struct DraftState {
  const Model& model;
  const Drafting& drafting;
  const int inner;  // size of the draft head; 0: there is none
  const int shortlist;
  const std::vector<std::vector<int>> levels;
  size_t widest = 0;           // nodes of a level, at most
  std::vector<int64_t> ids;    // [sats, shortlist]: the candidates
  std::vector<float> logits;   // [sats, shortlist]
  std::vector<Input<T>> both;  // [widest, 2 * hidden]: state and token, normed
  std::vector<Input<T>> middle, moves;     // [widest, inner], [widest, hidden]
  std::vector<T> ones;                     // [hidden]: the weight of those norms
  std::vector<std::vector<float>> scores;  // [widest][shortlist]

  DraftState(const Model& model, const Drafting& d)
      : model(model), drafting(d),
        inner(model.draft_inner.weight.weight ? model.draft_inner.out : 0), shortlist(d.shortlist),
        levels(parents_by_depth(d)), ids(d.sats * shortlist), logits(d.sats * shortlist),
        ones(model.hidden) {
    for (const auto& level : levels) widest = std::max(widest, level.size());
    both.resize(widest * 2 * model.hidden);
    middle.resize(widest * inner);
    moves.resize(widest * model.hidden);
    scores.assign(widest, std::vector<float>(shortlist));
    for (int i = 0; i < model.hidden; i += LANES) store(ones.data() + i, broadcast(1.f));
  }
};

// What one thread of a draft has for itself.
struct DraftThread {
  Worker& worker;
  std::vector<float> y;  // [widest, BLOCK]
  Ranking ranking;
  DraftThread(Worker& worker, int64_t widest, int64_t shortlist)
      : worker(worker), y(widest * BLOCK), ranking(shortlist) {}
};

// The candidates of every SAT, by its own logits.
template <class T> static void make_shortlists(DraftState<T>& s, DraftThread& thread) {
  const int64_t vocabulary = s.model.vocabulary;
  thread.worker.each(s.drafting.sats, [&](int64_t sat) {
    largest_of((const T*)s.drafting.logits + sat * vocabulary, vocabulary, s.shortlist,
               s.ids.data() + sat * s.shortlist, s.logits.data() + sat * s.shortlist);
  });
  thread.worker.meet();
}

// moves of each node of a level: what the draft head adds to the SAT's state.
template <class T> static void apply_head(DraftState<T>& s, DraftThread& thread, int sat) {
  const Model& m = s.model;
  const auto& level = s.levels[sat];
  const int rows = level.size();
  const int64_t hidden = m.hidden;
  float* y = thread.y.data();
  thread.worker.each(rows, [&](int r) {
    Input<T>* x = s.both.data() + r * 2 * hidden;
    const T* state = (const T*)s.drafting.states + sat * hidden;
    const T* token = (const T*)m.embedding + int64_t(s.drafting.tokens[level[r]]) * hidden;
    rms_norm<T>(state, s.ones.data(), hidden, m.draft_eps, x);
    rms_norm<T>(token, s.ones.data(), hidden, m.draft_eps, x + hidden);
  });
  thread.worker.meet();
  const Rows<T> both{s.both.data(), 2 * hidden, {}};
  thread.worker.each(s.inner / BLOCK, [&](int b) {
    const Matrix& w = m.draft_inner.weight;
    multiply_block(both, rows, w, b, w.block(b + 1), y);
    each_vector(rows, [&](int r, int c) {
      f32x gate = rounded<T>(load(y + r * BLOCK + c));
      store_rounded<T>(s.middle.data() + r * s.inner + b * BLOCK + c, silu(gate));
    });
  });
  thread.worker.meet();
  const Rows<T> middle{s.middle.data(), s.inner, {}};
  thread.worker.each(hidden / BLOCK, [&](int b) {
    const Matrix& w = m.draft_outer.weight;
    multiply_block(middle, rows, w, b, w.block(b + 1), y);
    store_block<T>(y, rows, b, s.moves.data(), hidden);
  });
  thread.worker.meet();
}

// The score of each candidate of a SAT, for each node of its level.
template <class T> static void score_candidates(DraftState<T>& s, DraftThread& thread, int sat) {
  const int64_t hidden = s.model.hidden;
  const int rows = s.levels[sat].size();
  thread.worker.each(s.shortlist, [&](int c) {
    const int64_t at = int64_t(sat) * s.shortlist + c;
    const T* row = (const T*)s.model.unembedding + s.ids[at] * hidden;
    for (int r = 0; r < rows; r++) {
      f32x total = {};
      for (int i = 0; i < hidden && s.inner; i += LANES)
        total += load(row + i) * load(s.moves.data() + r * hidden + i);
      s.scores[r][c] = s.logits[at] + sum(total);
    }
  });
  thread.worker.meet();
}

// The children of a node: of the candidates in order, those of the children's ranks.
template <class T>
static void fill_children(DraftState<T>& s, DraftThread& thread, int sat, int node,
                          const std::vector<float>& score) {
  const Drafting& d = s.drafting;
  const int64_t* ids = s.ids.data() + int64_t(sat) * s.shortlist;
  thread.ranking.rank(score.data(), ids, Noise(d.seed, d.index + sat), d.sampling, 0);
  const float best = *std::max_element(score.begin(), score.end());
  float total = 0;
  for (int c = 0; c < s.shortlist; c++) total += std::exp(score[c] - best);
  for (int child = node + 1; child < d.nodes; child++) {
    if (d.parents[child] != node) continue;
    const int column = thread.ranking.order[d.ranks[child]];
    d.tokens[child] = ids[column];
    d.likely[child] = std::exp(score[column] - best) / total;
  }
}

// Fill d.tokens and d.likely of a tree whose root's token is given.
template <class T> static void draft(const Model& model, const Drafting& d) {
  DraftState<T> state(model, d);
  auto make = [&](Worker& worker) { return DraftThread(worker, state.widest, state.shortlist); };
  parallel(model.threads, make, [&](DraftThread& thread) {
    make_shortlists(state, thread);
    for (size_t sat = 0; sat < state.levels.size(); sat++) {
      const auto& level = state.levels[sat];
      if (state.inner) apply_head(state, thread, sat);
      score_candidates(state, thread, sat);
      thread.worker.each(level.size(), [&](int r) {
        fill_children(state, thread, sat, level[r], state.scores[r]);
      });
      thread.worker.meet();
    }
  });
}
