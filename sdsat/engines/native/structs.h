// What Python hands over: bindings.py declares the same structs, field by field in this order.
//
// Pointers are to contiguous memory of the model's type (bfloat16 or float) where nothing else is
// said. Sizes are padded with zeros to whole blocks of outputs; a rank or size is the padded one.
#pragma once
#include <cstdint>

constexpr int LONGEST = 4;  // tokens before a candidate that are compared with the text

// What weights are, and how they lie in a block of outputs (kernels.h, int8.h, low_bits.h).
enum Form : int64_t {
  PLAIN,        // of the model's type
  INT8,         // 8 bits, a scale an output
  INT5,         // 5 bits, a scale in bfloat16 for a group of inputs; so in all that follow
  BITS5,        // 5 bits, a scale in half precision
  BITS5_LEAST,  // and a least number
  BITS4_LEAST,
  BITS5_LEAST_FLOAT,  // both in float
  BITS4_LEAST_FLOAT,
  BITS8,         // 8 bits, a scale in half precision
  BITS6_HALVES,  // values from -32 to 31 in 8 bits; two scales in float, each for half a group
};

// The weights of a linear layer, block by block of outputs.
struct Matrix {
  const char* weight;
  const char* scale;  // floats, one an output, of INT8; else null
  int64_t stride;     // bytes from one block to the next: what is read together lies together
  int64_t form;       // a Form
  const char* block(int64_t b) const { return weight + b * stride; }
};

// weight [out, in]; and the adapter's down [rank, in] and up [out, rank], for SAT rows only.
struct Linear {
  Matrix weight, down, up;
  const void* bias;  // [out], or null
  int64_t out, in;
  int64_t rank;  // 0: no adapter
};

struct Layer {
  const void *norm_attention, *norm_mlp;  // [hidden]
  const void *norm_q, *norm_k;            // [dim], or null
  Linear q, k, v, o, gate, up, down;
};

struct Model {
  int64_t layers, hidden, heads, kv_heads, dim, inner, vocabulary;
  int64_t positions;  // for so many there are cosines and sines
  int64_t threads;
  int64_t in_8_bits;       // whether some linear layer reads its rows in 8 bits
  float eps, scale;        // of the norms; of the scores of attention
  const float *cos, *sin;  // [positions, dim]
  const void* norm;        // [hidden]
  Linear head;             // the output layer
  Linear draft_head;       // its rows of the draft vocabulary; no weight where there is none
  int64_t draft_tokens;    // how many those are
  const Layer* layer;      // [layers]
  const void *embedding, *unembedding;  // [vocabulary, hidden] row by row, for drafting
  Linear draft_inner, draft_outer;      // the draft head; no weight where there is none
  float draft_eps;
  float sharpness, copies[LONGEST];  // the head's numbers: models/head.py
};

// Keys and values of one sequence (cache.h: how they lie there).
struct Cache {
  void *keys, *values;
  int64_t slots;  // per layer and head; a multiple of KEY_BLOCK
};

// A pass over `rows` rows of `caches` sequences.
struct Pass {
  void* x;  // [rows, hidden]: the embeddings; changed
  void* states;  // [rows, hidden]: where the last hidden states go; null: only keys and values are
                 // wanted, as of a prompt that is read
  void* logits;  // [rows, vocabulary]: where the logits go; with a draft vocabulary those of the
  void* sat_logits;  // rows before SATs, and theirs come here: [sats, draft_tokens]
  const int64_t *positions, *slots, *sequences;  // [rows]: of each row
  const int64_t* lengths;                        // [rows]: tokens that its sequence has committed
  const uint8_t* within;  // [rows, rows]: whether a row sees a row of this pass
  int64_t caches, rows;
  int64_t sats;  // so many rows, the last ones, are SATs
};

struct Sampling {
  double temperature;  // 0: greedy
  double top_p;        // 1: all
  int64_t top_k;       // 0: all
};

// A draft tree to fill with tokens, or to grow, from the states and logits of `sats` SATs.
struct Drafting {
  const void *states, *logits;  // [sats, hidden], [sats, columns]
  const int64_t* ids;           // [columns]: the tokens; null: each column is its own
  int64_t *parents, *ranks;     // [nodes]; where it grows they are found
  const int64_t* depths;        // [nodes] of a tree that is given
  double *tokens, *likely;      // [nodes]: what is found, and the draft's probability
  const int64_t* text;          // [known]: tokens up to the root's one, which is the last
  int64_t known;
  int64_t nodes, sats, columns;
  int64_t shortlist;  // so many candidates of a SAT are looked at
  int64_t index;      // of the first draft among the emitted tokens, for its noise
  uint64_t seed;
  Sampling sampling;
};
