// The C interface: what bindings.py calls, and the checks of what it gives.
//
// This file includes all others: one translation unit, so that the compiler sees everything at
// once. Each function returns nothing, or in one line why it could not be done. Nothing behind it
// trusts an index, because all of them are checked here first.
#include "cache.h"
#include "drafting.h"
#include "errors.h"
#include "forward.h"
#include "largest.h"
#include "sampling.h"
#include "structs.h"

// ---- checks ----

static void check_row(const Model& m, const Cache* caches, const Pass& pass, int64_t row) {
  const int64_t sequence = pass.sequences[row];
  check(sequence >= 0 && sequence < pass.caches,
        "sequences: a row of a sequence that has no cache");
  const int64_t slots = caches[sequence].slots;
  check(slots % KEY_BLOCK == 0, "cache: expected whole blocks of slots");
  check(pass.slots[row] >= 0 && pass.slots[row] < slots, "slots: a row beyond the cache's end");
  check(pass.positions[row] >= 0 && pass.positions[row] < m.positions,
        "positions: a row beyond those that the model was loaded for");
  check(pass.lengths[row] >= 0 && pass.within[row * pass.rows + row],
        "within: every row must see itself");
  int64_t last = pass.lengths[row] - 1;
  for (int64_t j = 0; j < pass.rows; j++) {
    if (!pass.within[row * pass.rows + j]) continue;
    check(pass.sequences[j] == sequence && pass.slots[j] > last && pass.slots[j] < slots,
          "within: expected rows of the same sequence, with slots that ascend from its length on");
    last = pass.slots[j];
  }
}

static void check_pass(const Model& m, const Cache* caches, const Pass& pass) {
  check(pass.rows >= 1 && pass.sats >= 0 && pass.sats <= pass.rows,
        "rows: expected at least one, of which SATs are some");
  for (int64_t row = 0; row < pass.rows; row++) check_row(m, caches, pass, row);
}

static void check_move(const Cache& cache, int64_t length, const int64_t* from, int64_t count) {
  check(length >= 0 && length + count <= cache.slots, "rows: more than the cache has room for");
  for (int64_t j = 0; j < count; j++)
    check(from[j] >= length + j && from[j] < cache.slots && (!j || from[j] > from[j - 1]),
          "rows: expected those of the last pass, in ascending order");
}

static void check_draft(const Model& m, const Drafting& d) {
  check(d.nodes >= 1 && d.shortlist >= 1 && d.shortlist <= d.columns,
        "shortlist: expected 1 to the number of logits of a row");
  for (int64_t c = 0; d.ids && c < d.columns; c++)
    check(d.ids[c] >= 0 && d.ids[c] < m.vocabulary, "ids: a token that is not in the vocabulary");
  check(d.ids || d.columns <= m.vocabulary, "logits: more than tokens");
  check(d.tokens[0] >= 0 && d.tokens[0] < m.vocabulary,
        "text: its last token is not in the vocabulary");
}

static void check_tree(const Drafting& d) {
  check(d.depths[0] == 0, "tree: its root must be at depth 0");
  for (int64_t child = 1; child < d.nodes; child++) {
    const int64_t parent = d.parents[child];
    check(parent >= 0 && parent < child && d.depths[child] == d.depths[parent] + 1,
          "tree: expected parents before children");
    check(d.depths[child] <= d.sats, "tree: deeper than there are SATs");
    check(d.ranks[child] >= 0 && d.ranks[child] < d.shortlist, "tree: wider than the shortlist");
  }
}

static void check_choose(int64_t size, const Sampling& s) {
  check(size >= 1, "logits: expected at least one a row");
  check(s.temperature > 0 && s.top_p > 0 && s.top_p <= 1 && s.top_k >= 0,
        "sampling: a setting out of range");
}

// ---- exported functions ----

// f(a value of the model's type), guarded.
template <class F> static const char* typed(int is_bf16, const F& f) {
  return guarded([&] { is_bf16 ? f(bf16{}) : f(float{}); });
}

extern "C" {

int sdsat_lanes() { return LANES; }

const char* sdsat_pass(const Model* m, const Cache* caches, const Pass* pass, int is_bf16) {
  return typed(is_bf16, [&](auto type) {
    check_pass(*m, caches, *pass);
    forward<decltype(type)>(*m, caches, *pass);
  });
}

const char* sdsat_move(const Model* m, const Cache* cache, int64_t length, const int64_t* from,
                       int64_t count, int is_bf16) {
  return typed(is_bf16, [&](auto type) {
    check_move(*cache, length, from, count);
    move_rows<decltype(type)>(*m, *cache, length, from, count);
  });
}

const char* sdsat_draft(const Model* m, const Drafting* d, int is_bf16) {
  return typed(is_bf16, [&](auto type) {
    check_draft(*m, *d);
    check_tree(*d);
    draft<decltype(type)>(*m, *d);
  });
}

const char* sdsat_grow(const Model* m, const Drafting* d, int is_bf16) {
  return typed(is_bf16, [&](auto type) {
    check_draft(*m, *d);
    grow<decltype(type)>(*m, *d);
  });
}

const char* sdsat_choose(const void* x, int64_t rows, int64_t size, const int64_t* index,
                         const uint64_t* seeds, const Sampling* s, int64_t* chosen, int threads,
                         int is_bf16) {
  return typed(is_bf16, [&](auto type) {
    check_choose(size, *s);
    choose((const decltype(type)*)x, rows, size, index, seeds, *s, chosen, threads);
  });
}

const char* sdsat_largest(const void* x, int64_t rows, int64_t size, int64_t count, int64_t* ids,
                          float* values, int threads, int is_bf16) {
  return typed(is_bf16, [&](auto type) {
    check(count >= 1 && count <= size, "count: expected 1 to the number of logits of a row");
    largest((const decltype(type)*)x, rows, size, count, ids, values, threads);
  });
}
}
