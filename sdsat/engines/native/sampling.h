// Choosing tokens: argmax of log p + Gumbel noise among what top-k and top-p leave (sampling.py).
//
// Fast: only tokens that can win get a logarithm, and only those that the filters can leave are
// sorted. Exact: the noise belongs to seed, emitted index and token, so a draft and its
// verification draw the same; and the same token comes out as from sampling.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "largest.h"
#include "structs.h"
#include "threads.h"
#include "vectors.h"

// ---- noise ----

// splitmix64's: any change of the input changes half of the output's bits.
static uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Gumbel noise of the tokens at one emitted index: sampling.gumbel_noise.
class Noise {
 public:
  static constexpr int BITS = 52;  // of a uniform number: as many as a double's fraction has
  static constexpr uint64_t ONES = (uint64_t(1) << BITS) - 1;

  Noise(uint64_t seed, int64_t index) : row(mix(mix(seed) + (index + 1) * GOLDEN)) {}

  // BITS random bits, for a token's uniform number.
  uint64_t bits(int64_t token) const { return mix(row + (token + 1) * GOLDEN) >> (64 - BITS); }

  static double of(uint64_t bits) {
    return -std::log(-std::log((bits + 0.5) / (uint64_t(1) << BITS)));
  }

  double operator()(int64_t token) const { return of(bits(token)); }

 private:
  static constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio: splitmix64's step
  uint64_t row;
};

// ---- all tokens ----

// The token with the most of log p + noise among all.
//
// -log(-log u) <= -log(1 - u) <= log 2 * (zeros that 1 - u begins with, and one more): so few
// tokens need a logarithm.
template <class T>
static int64_t sample_of_all(const T* x, int64_t size, const Sampling& s, const Noise& noise) {
  constexpr int AT_ONCE = 64;
  constexpr int FRACTION_BITS = 52;  // of a double, below its exponent
  constexpr double BIAS = 1023;      // of the exponent
  constexpr double SLACK = 0.001;    // more than this arithmetic's errors
  constexpr double LN2 = 0.6931471805599454;
  double best = -std::numeric_limits<double>::infinity();
  int64_t token = 0;
  for (int64_t i = 0; i < size; i += AT_ONCE) {
    const int count = std::min<int64_t>(AT_ONCE, size - i);
    uint64_t bits[AT_ONCE], exponents[AT_ONCE];
    double rest[AT_ONCE], most[AT_ONCE];  // 2^BITS * (1 - u), rounded down; no score is above
    for (int j = 0; j < AT_ONCE; j++) bits[j] = noise.bits(i + j);
    for (int j = 0; j < AT_ONCE; j++) rest[j] = double(int64_t(bits[j] ^ Noise::ONES));
    memcpy(exponents, rest, sizeof rest);
    for (int j = 0; j < count; j++) {
      const double exponent = double(int64_t(exponents[j] >> FRACTION_BITS));
      most[j] = to_float(x[i + j]) * (1 / s.temperature) +
                (Noise::BITS + BIAS + SLACK - exponent) * LN2;
    }
    for (int j = 0; j < count; j++) {
      if (most[j] <= best) continue;
      double score = to_float(x[i + j]) / s.temperature + Noise::of(bits[j]);
      if (score > best) {
        best = score;
        token = i + j;
      }
    }
  }
  return token;
}

// ---- what the filters leave ----

// Columns of a shortlist, best first, and what it takes to put them in order.
class Ranking {
 public:
  std::vector<int> order;     // of the columns, best first
  std::vector<double> shares;  // of the columns, by `weigh`

  explicit Ranking(int64_t size) : order(size), shares(size), scaled(size), noisy(size) {}

  // By score; or by log p + noise among what top-k and top-p leave, and behind them by score.
  //
  // Columns are in order of their ids: of equal scores those with the lower ids are the first that
  // top-p drops (sampling.py says why). total: what exp(score / temperature), as a share of the
  // largest one, is in all; 0: in the columns that top-k leaves.
  void rank(const float* score, const int64_t* ids, const Noise& noise, const Sampling& s,
            double total) {
    const int size = order.size();
    const float temperature = s.temperature;
    for (int c = 0; c < size; c++) {
      order[c] = s.temperature ? size - 1 - c : c;
      scaled[c] = s.temperature ? score[c] / temperature : score[c];
      if (scaled[c] != scaled[c]) scaled[c] = LEAST;
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return scaled[a] > scaled[b];
    });
    kept = size;
    if (!s.temperature) return;
    kept = left(s, total);
    for (int c = 0; c < kept; c++) noisy[order[c]] = scaled[order[c]] + noise(ids[order[c]]);
    std::stable_sort(order.begin(), order.begin() + kept, [&](int a, int b) {
      return noisy[a] > noisy[b];
    });
  }

  // How likely each column seems the first, after `rank`: its share by what it was ranked by, in
  // units of scores; none for what the filters drop.
  void weigh(const Sampling& s) {
    auto value = [&](int c) { return s.temperature ? s.temperature * noisy[c] : scaled[c]; };
    std::fill(shares.begin(), shares.end(), 0.0);
    double total = 0;
    for (int i = 0; i < kept; i++) {
      const int c = order[i];
      total += shares[c] = std::exp(value(c) - value(order[0]));
    }
    for (double& share : shares) share /= total;
  }

 private:
  // How many columns the filters leave, in order of their scores.
  int left(const Sampling& s, double total) const {
    int64_t kept = order.size();
    if (s.top_k && s.top_k < kept)
      while (scaled[order[kept - 1]] < scaled[order[s.top_k - 1]]) kept--;
    if (s.top_p == 1) return kept;
    auto share = [&](int c) { return std::exp(double(scaled[order[c]] - scaled[order[0]])); };
    if (!total)
      for (int c = 0; c < kept; c++) total += share(c);
    double before = 0;
    for (int c = 0; c < kept; c++) {
      if (c && before >= s.top_p * total) return c;
      before += share(c);
    }
    return kept;
  }

  std::vector<float> scaled;
  std::vector<double> noisy;
  int kept = 0;  // columns that the filters leave
};

// Tokens that a filter can leave, in order of their ids.
struct Candidates {
  std::vector<int64_t> ids;
  std::vector<float> logits;
  void add(int64_t id, float logit) {
    ids.push_back(id);
    logits.push_back(logit);
  }
};

// What top-k leaves: all that are no less than the k-th, once divided.
template <class T>
static void add_top_k(const T* x, int64_t size, const Sampling& s, Candidates& found) {
  std::vector<int64_t> first(s.top_k);
  std::vector<float> best(s.top_k);
  largest_of(x, size, s.top_k, first.data(), best.data());
  const float temperature = s.temperature;
  const float least = best.back() / temperature;
  auto offer = [&](int64_t i, float v) {
    if (v / temperature >= least && v > LEAST) found.add(i, v);
  };
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES)
    if (any(load(x + i) / temperature >= broadcast(least)))
      for (int j = 0; j < LANES; j++) offer(i + j, to_float(x[i + j]));
  for (; i < size; i++) offer(i, to_float(x[i]));
}

// What top-p of the whole vocabulary can leave. Returns `total` for Ranking.
template <class T>
static double add_top_p(const T* x, int64_t size, const Sampling& s, Candidates& found) {
  constexpr double SLACK = 0.99;  // by more than exponential() errs
  const float temperature = s.temperature;
  float most = LEAST;
  std::vector<float> share((size + LANES - 1) / LANES * LANES, LEAST);
  for (int64_t i = 0; i < size; i++) {
    share[i] = to_float(x[i]) / temperature;
    most = std::max(most, share[i]);
  }
  double total = 0;
  for (size_t i = 0; i < share.size(); i += LANES) {
    f32x e = exponential(load(share.data() + i) - most);
    store(share.data() + i, e);
    total += sum(e);
  }
  // tokens of less have no more than 1 - top_p together: the others suffice
  const double least = (1 - s.top_p) * total / size;
  for (int64_t i = 0; i < size; i++)
    if (!(share[i] < SLACK * least)) found.add(i, to_float(x[i]));
  return total;
}

// The next token of one row of logits x [size].
template <class T>
static int64_t choose_one(const T* x, int64_t size, const Sampling& s, const Noise& noise) {
  const bool few = s.top_k && s.top_k < size;
  if (!few && s.top_p == 1) return sample_of_all(x, size, s, noise);
  Candidates found;
  double total = 0;
  if (few) add_top_k(x, size, s, found);
  else total = add_top_p(x, size, s, found);
  if (found.ids.empty()) return 0;  // no logit is a number
  Ranking ranking(found.ids.size());
  ranking.rank(found.logits.data(), found.ids.data(), noise, s, total);
  return found.ids[ranking.order[0]];
}

// chosen [rows]: the next token of each row of logits x [rows, size]. index: emitted before it.
template <class T>
static void choose(const T* x, int64_t rows, int64_t size, const int64_t* index,
                   const uint64_t* seeds, const Sampling& s, int64_t* chosen, int threads) {
  parallel_for(threads, rows, [&](int64_t r) {
    chosen[r] = choose_one(x + r * size, size, s, Noise(seeds[r], index[r]));
  });
}
