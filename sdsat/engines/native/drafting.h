// Drafting: tokens for a tree of drafts, from the SATs' states and logits through the draft head.
//
// The draft head moves a SAT's logits by what the token drafted before it says: moves =
// outer(silu(inner([norm(state), norm(embedding of that token)]))), and a candidate's score is
// sharpness * (its logit + its row of the unembedding . moves) + what the text adds to it
// (models/head.py and method/copies.py are the reference). Fast: several nodes together, as the
// head's weights take longer to read than to use; and a shortlist of each SAT's candidates instead
// of the vocabulary. Exact by itself it need not be: drafts are verified.
//
// A tree is given, and filled depth by depth; or it grows where it is likeliest.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "linear.h"
#include "norms.h"
#include "sampling.h"
#include "structs.h"
#include "threads.h"

// The last tokens up to a node, its own the last one; NONE in front where there are fewer.
using Path = std::array<int64_t, LONGEST>;
constexpr int64_t NONE = -1;

// The path to the root.
static Path root_path(const Drafting& d) {
  Path path;
  for (int64_t n = 0; n < LONGEST; n++) {
    const int64_t at = d.known - LONGEST + n;
    path[n] = at < 0 ? NONE : d.text[at];
  }
  return path;
}

static Path longer(Path path, int64_t token) {
  std::copy(path.begin() + 1, path.end(), path.begin());
  path.back() = token;
  return path;
}

// A node that gets children, and the SAT that guesses them: one row of the draft head.
struct Place {
  int node, sat;
  Path path;       // to the node
  double through;  // how likely the walk passes it, where a tree grows
};
using Places = std::vector<Place>;

// What the threads of a draft share.
template <class T> struct DraftState {
  const Model& model;
  const Drafting& drafting;
  const int inner;  // size of the draft head; 0: there is none
  const int shortlist;
  Places places;               // whose candidates are scored together
  std::vector<int64_t> ids;    // [sats, shortlist]: the candidates
  std::vector<float> logits;   // [sats, shortlist]
  std::vector<Input<T>> both;  // [widest, 2 * hidden]: state and token, normed
  std::vector<Input<T>> middle, moves;     // [widest, inner], [widest, hidden]
  std::vector<T> ones;                     // [hidden]: the weight of those norms
  std::vector<std::vector<float>> scores;  // [widest][shortlist]

  // widest: places at most.
  DraftState(const Model& model, const Drafting& d, size_t widest)
      : model(model), drafting(d),
        inner(model.draft_inner.weight.weight ? model.draft_inner.out : 0), shortlist(d.shortlist),
        ids(d.sats * shortlist), logits(d.sats * shortlist), both(widest * 2 * model.hidden),
        middle(widest * inner), moves(widest * model.hidden), ones(model.hidden),
        scores(widest, std::vector<float>(shortlist)) {
    places.reserve(widest);
    for (int i = 0; i < model.hidden; i += LANES) store(ones.data() + i, broadcast(1.f));
  }
};

// What one thread of a draft has for itself.
struct DraftThread {
  Worker& worker;
  std::vector<float> y;  // [widest, BLOCK]
  std::vector<int> longest;  // [shortlist]: so many tokens before each candidate came before it
  Ranking ranking;
  DraftThread(Worker& worker, int64_t widest, int64_t shortlist)
      : worker(worker), y(widest * BLOCK), longest(shortlist), ranking(shortlist) {}
};

// The candidates of every SAT, by its own logits.
template <class T> static void make_shortlists(DraftState<T>& s, DraftThread& thread) {
  const Drafting& d = s.drafting;
  thread.worker.each(d.sats, [&](int64_t sat) {
    int64_t* ids = s.ids.data() + sat * s.shortlist;
    largest_of((const T*)d.logits + sat * d.columns, d.columns, s.shortlist, ids,
               s.logits.data() + sat * s.shortlist);
    for (int c = 0; d.ids && c < s.shortlist; c++) ids[c] = d.ids[ids[c]];
  });
  thread.worker.meet();
}

// moves of each place: what the draft head adds to the SAT's state.
template <class T> static void apply_head(DraftState<T>& s, DraftThread& thread) {
  const Model& m = s.model;
  const int rows = s.places.size();
  const int64_t hidden = m.hidden;
  float* y = thread.y.data();
  thread.worker.each(rows, [&](int r) {
    const Place& place = s.places[r];
    Input<T>* x = s.both.data() + r * 2 * hidden;
    const T* state = (const T*)s.drafting.states + place.sat * hidden;
    const T* token = (const T*)m.embedding + place.path.back() * hidden;
    rms_norm<T>(state, s.ones.data(), hidden, m.draft_eps, x);
    rms_norm<T>(token, s.ones.data(), hidden, m.draft_eps, x + hidden);
  });
  thread.worker.meet();
  const Rows<T> both{s.both.data(), 2 * hidden, {}};
  thread.worker.each(s.inner / BLOCK, [&](int b) {
    const Matrix& w = m.draft_inner.weight;
    multiply_block(both, rows, w, b, w.block(b + 1), y);
    each_vector(rows, [&](int r, int c) {
      f32x gate = nearest<T>(load(y + r * BLOCK + c));
      store_nearest<T>(s.middle.data() + r * s.inner + b * BLOCK + c, silu(gate));
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

// What the text adds to the scores of a place's candidates, [shortlist].
template <class T>
static void add_copies(DraftState<T>& s, DraftThread& thread, const Place& place, float* scores) {
  const int64_t* text = s.drafting.text;
  const int64_t* ids = s.ids.data() + int64_t(place.sat) * s.shortlist;
  std::vector<int>& longest = thread.longest;
  std::fill(longest.begin(), longest.end(), 0);
  for (int64_t i = 1; i < s.drafting.known; i++) {
    int n = 0;
    while (n < LONGEST && n < i && text[i - 1 - n] == place.path[LONGEST - 1 - n]) n++;
    if (!n) continue;
    for (int c = 0; c < s.shortlist; c++)
      if (ids[c] == text[i]) longest[c] = std::max(longest[c], n);
  }
  for (int c = 0; c < s.shortlist; c++)
    for (int n = 0; n < longest[c]; n++) scores[c] += s.model.copies[n];
}

// The score of each candidate of a place's SAT, for every place, without what the text adds.
template <class T> static void score_candidates(DraftState<T>& s, DraftThread& thread) {
  if (s.inner) apply_head(s, thread);
  const int64_t hidden = s.model.hidden;
  const int rows = s.places.size();
  thread.worker.each(s.shortlist, [&](int c) {
    for (int r = 0; r < rows; r++) {
      const int64_t at = int64_t(s.places[r].sat) * s.shortlist + c;
      const T* row = (const T*)s.model.unembedding + s.ids[at] * hidden;
      f32x total = {};
      for (int i = 0; i < hidden && s.inner; i += LANES)
        total += load(row + i) * load(s.moves.data() + r * hidden + i);
      s.scores[r][c] = s.model.sharpness * (s.logits[at] + sum(total));
    }
  });
  thread.worker.meet();
}

// Put the candidates of a place in order, by all that is known of them. Returns their ids.
template <class T>
static const int64_t* rank_candidates(DraftState<T>& s, DraftThread& thread, int r) {
  const Drafting& d = s.drafting;
  const int sat = s.places[r].sat;
  if (s.inner) add_copies(s, thread, s.places[r], s.scores[r].data());
  const int64_t* ids = s.ids.data() + int64_t(sat) * s.shortlist;
  thread.ranking.rank(s.scores[r].data(), ids, Noise(d.seed, d.index + sat), d.sampling, 0);
  thread.ranking.weigh(d.sampling);
  return ids;
}

// ---- a tree that is given ----

// By depth: the nodes that have children, which a SAT's candidates fill.
static std::vector<Places> places_by_depth(const Drafting& d) {
  std::vector<Places> levels;
  for (int child = 1; child < d.nodes; child++) {
    const int node = d.parents[child];
    const int depth = d.depths[node];
    levels.resize(std::max<size_t>(levels.size(), depth + 1));
    Places& level = levels[depth];
    auto same = [&](const Place& place) { return place.node == node; };
    if (std::none_of(level.begin(), level.end(), same)) level.push_back({node, depth, {}, 1});
  }
  return levels;
}

static Path path_to(const Drafting& d, int node) {
  return node ? longer(path_to(d, d.parents[node]), d.tokens[node]) : root_path(d);
}

// Fill d.tokens and d.likely of a tree whose root's token is given.
template <class T> static void draft(const Model& model, const Drafting& d) {
  const std::vector<Places> levels = places_by_depth(d);
  size_t widest = 0;
  for (const Places& level : levels) widest = std::max(widest, level.size());
  DraftState<T> s(model, d, widest);
  auto make = [&](Worker& worker) { return DraftThread(worker, widest, s.shortlist); };
  parallel(model.threads, make, [&](DraftThread& thread) {
    make_shortlists(s, thread);
    for (const Places& level : levels) {
      if (!thread.worker.rank) {
        s.places = level;
        for (Place& place : s.places) place.path = path_to(d, place.node);
      }
      thread.worker.meet();
      score_candidates(s, thread);
      // The children of a node: of the candidates in order, those of the children's ranks.
      thread.worker.each(level.size(), [&](int r) {
        const int64_t* ids = rank_candidates(s, thread, r);
        for (int child = level[r].node + 1; child < d.nodes; child++) {
          if (d.parents[child] != level[r].node) continue;
          const int column = thread.ranking.order[d.ranks[child]];
          d.tokens[child] = ids[column];
          d.likely[child] = thread.ranking.shares[column];
        }
      });
      thread.worker.meet();
    }
  });
}

// ---- a tree that grows ----

// The likeliest nodes so far, by the product of confidences from the root on, `most` at most.
//
// Of equals those that came first are first, so that parents precede their children, and leave
// after them. Once each has been asked for its children these are the likeliest of all.
class Growth {
 public:
  struct Node {
    int parent, rank, depth;
    Path path;
    double likely, through;  // given its parent; and its ancestors too
    bool asked;              // for its children
  };

  Growth(int most, const Path& root) : most(most), nodes(most) {
    order.reserve(most + 1);
    nodes[0] = {-1, 0, 0, root, 1, 1, false};
    order.push_back(0);
  }

  // The likeliest that can have children and were not asked for them: `count` at most.
  void ask(int depth, size_t count, Places& places) {
    places.clear();
    for (size_t i = 0; i < order.size() && places.size() < count; i++) {
      Node& node = nodes[order[i]];
      if (node.asked || node.depth >= depth) continue;
      node.asked = true;
      places.push_back({order[i], node.depth, node.path, node.through});
    }
  }

  // Take in a child of a place, unless `most` nodes are as likely.
  void offer(const Place& above, int rank, int64_t token, double likely) {
    const double through = above.through * likely;
    const bool full = int(order.size()) == most;
    if (!(through > (full ? nodes[order.back()].through : 0))) return;
    const int slot = full ? order.back() : order.size();
    if (full) order.pop_back();
    const Path path = longer(above.path, token);
    nodes[slot] = {above.node, rank, above.sat + 1, path, likely, through, false};
    auto precedes = [&](double value, int other) { return value > nodes[other].through; };
    order.insert(std::upper_bound(order.begin(), order.end(), through, precedes), slot);
  }

  // Likeliest first; what is lacking has no likelihood.
  void write(const Drafting& d) const {
    std::vector<int> place(most);
    for (size_t i = 0; i < order.size(); i++) {
      const Node& node = nodes[order[i]];
      place[order[i]] = i;
      d.parents[i] = i ? place[node.parent] : -1;
      d.ranks[i] = node.rank;
      d.tokens[i] = node.path.back();
      d.likely[i] = node.likely;
    }
  }

 private:
  const int most;
  std::vector<Node> nodes;
  std::vector<int> order;  // of the nodes, likeliest first
};

// A candidate for a node, as its parent has it.
struct Candidate {
  int64_t token;
  double likely;
};

// Grow a tree of d.nodes nodes at most below the token of its root.
template <class T> static void grow(const Model& model, const Drafting& d) {
  // Nodes that are asked for children together. More cost less each, but more are asked in vain.
  constexpr int TOGETHER = 4;
  const int children = std::min(d.nodes - 1, d.shortlist);  // of a node, at most
  DraftState<T> s(model, d, TOGETHER);
  Growth growth(d.nodes, root_path(d));
  std::vector<Candidate> candidates(TOGETHER * children);
  auto make = [&](Worker& worker) { return DraftThread(worker, TOGETHER, s.shortlist); };
  growth.ask(children ? d.sats : 0, TOGETHER, s.places);
  parallel(model.threads, make, [&](DraftThread& thread) {
    make_shortlists(s, thread);
    while (!s.places.empty()) {
      score_candidates(s, thread);
      thread.worker.each(s.places.size(), [&](int r) {
        const int64_t* ids = rank_candidates(s, thread, r);
        for (int rank = 0; rank < children; rank++) {
          const int column = thread.ranking.order[rank];
          candidates[r * children + rank] = {ids[column], thread.ranking.shares[column]};
        }
      });
      thread.worker.meet();
      if (!thread.worker.rank) {
        for (size_t r = 0; r < s.places.size(); r++)
          for (int rank = 0; rank < children; rank++) {
            const Candidate& found = candidates[r * children + rank];
            growth.offer(s.places[r], rank, found.token, found.likely);
          }
        growth.ask(d.sats, TOGETHER, s.places);
      }
      thread.worker.meet();
    }
  });
  growth.write(d);
}
