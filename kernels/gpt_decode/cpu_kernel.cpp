// New tokens through all layers of a GPT-2, in float32 with matrices in float32, bfloat16 or int8.
//
// One parallel region a call, in which threads meet four times a layer. Each owns the same share of rows of every matrix;
// what is short, the layer norms, each computes for itself.
#include "activations.h"
#include "decoding.h"
#include "kernel.h"
#include "memory.h"
#include "team.h"

namespace {

constexpr int64_t kRows = 64;               // tokens that pass through a layer together: a prompt goes in such parts
constexpr int64_t kUnit = 16;               // rows of a matrix: results of two threads lie in different cache lines
constexpr int64_t kParallelWeights = 1 << 16;  // weights of a layer that are worth a second thread
constexpr int64_t kTensors = 12, kMatrices = 4;  // of a layer

struct Sizes {
  int64_t layers, batch, heads, channels, hidden, vocabulary, room;
  float eps;
  int64_t head_dim() const { return channels / heads; }
  int64_t width() const { return whole_vectors(channels); }
  int64_t wide() const { return whole_vectors(hidden); }
};

// Addresses of tensors in the order of layout.py; `scales` has one for each matrix, or is null.
template <class W>
struct Weights {
  const int64_t *tensors, *scales;
  Sizes size;

  const float* vector(int64_t k) const { return reinterpret_cast<const float*>(tensors[k]); }
  const float* scale(int64_t k) const { return scales ? reinterpret_cast<const float*>(scales[k]) : nullptr; }
  const W* matrix(int64_t k) const { return reinterpret_cast<const W*>(tensors[k]); }

  const float* vector(int64_t layer, int64_t k) const { return vector(2 + layer * kTensors + k); }
  // Matrix j = 0 .. 3 of a layer, whose weight is tensor k and whose bias follows it.
  Linear<W> linear(int64_t layer, int64_t j, int64_t k, int64_t rows, int64_t depth) const {
    const int64_t at = 2 + layer * kTensors + k;
    return {matrix(at), scale(1 + layer * kMatrices + j), vector(at + 1), rows, depth};
  }
  Linear<W> qkv(int64_t layer) const { return linear(layer, 0, 2, 3 * size.channels, size.channels); }
  Linear<W> attention_out(int64_t layer) const { return linear(layer, 1, 4, size.channels, size.channels); }
  Linear<W> up(int64_t layer) const { return linear(layer, 2, 8, size.hidden, size.channels); }
  Linear<W> down(int64_t layer) const { return linear(layer, 3, 10, size.channels, size.hidden); }
  const float* last_norm() const { return vector(2 + size.layers * kTensors); }
  const float* last_norm_bias() const { return vector(3 + size.layers * kTensors); }
  Linear<W> head() const {
    return {matrix(4 + size.layers * kTensors), scale(1 + size.layers * kMatrices), nullptr, size.vocabulary,
            size.channels};
  }
};

void layer_norm(const float* x, const float* weight, const float* bias, int64_t channels, float eps, float* y) {
  float sum = 0.0f, off = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < channels; ++i) sum += x[i];
  const float mean = sum / float(channels);
  // Around a mean that is off by its rounding, which is then known too.
#pragma omp simd reduction(+ : off, squares)
  for (int64_t i = 0; i < channels; ++i) off += x[i] - mean, squares += (x[i] - mean) * (x[i] - mean);
  const float rest = off / float(channels), variance = squares / float(channels) - rest * rest;
  const float rstd = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) y[i] = ((x[i] - mean) - rest) * rstd * weight[i] + bias[i];
}

// Memory of the tokens that are on their way, which all threads share: rows with zeros up to a whole vector.
struct Shared {
  const Memory<float> x;
  float *const qkv, *const attended, *const hidden;
  Shared(const Sizes& s, int64_t rows)
      : x(rows * each(s)), qkv(x + rows * s.width()), attended(qkv + rows * whole_vectors(3 * s.channels)),
        hidden(attended + rows * s.width()) {
    std::memset(x, 0, size_t(rows * each(s)) * sizeof(float));
  }
  static int64_t each(const Sizes& s) { return 2 * s.width() + whole_vectors(3 * s.channels) + s.wide(); }
};

// Tokens first .. first + tokens - 1 of each sample: row b tokens + t.
struct Part {
  int64_t first, tokens;
};

// What one thread does.
template <class W>
class Worker {
 public:
  // `memory` has room(s, rows) floats.
  Worker(const Weights<W>& weights, const Shared& shared, Barrier& everyone, float* cache, int64_t rows, int64_t length,
         float* memory)
      : w_(weights), s_(weights.size), shared_(shared), everyone_(everyone), cache_(cache), length_(length),
        normed_(memory), query_(normed_ + rows * s_.width()), scores_(query_ + whole_vectors(s_.head_dim())) {
    std::memset(memory, 0, size_t(scores_ - memory) * sizeof(float));
  }
  static int64_t room(const Sizes& s, int64_t rows) {
    return rows * s.width() + whole_vectors(s.head_dim()) + s.room;
  }

  void embed(const int64_t* ids, int64_t ids_row, const Part& part) {
    const int64_t rows = s_.batch * part.tokens, channels = s_.channels;
    const Share mine(rows);
    for (int64_t r = mine.first; r < mine.last; ++r) {
      const int64_t b = r / part.tokens, t = part.first + r % part.tokens, id = ids[b * ids_row + t];
      const float scale = w_.scale(0) ? w_.scale(0)[id] : 1.0f;
      const W* const token = w_.matrix(0) + id * channels;
      const float* const position = w_.vector(1) + (length_ + t) * channels;
      float* const x = shared_.x + r * s_.width();
      for (int64_t i = 0; i < channels; ++i) x[i] = widen(token[i]) * scale + position[i];
    }
    everyone_.wait();
  }

  void layer(int64_t l, const Part& part) {
    const int64_t rows = s_.batch * part.tokens, width = s_.width(), qkv_row = whole_vectors(3 * s_.channels);
    norm(rows, w_.vector(l, 0), w_.vector(l, 1));
    multiply(w_.qkv(l), {normed_, width, shared_.qkv, qkv_row, false}, rows);
    everyone_.wait();
    attention(l, part);
    everyone_.wait();
    multiply(w_.attention_out(l), {shared_.attended, width, shared_.x, width, true}, rows);
    everyone_.wait();
    norm(rows, w_.vector(l, 6), w_.vector(l, 7));
    const Share mine = multiply(w_.up(l), {normed_, width, shared_.hidden, s_.wide(), false}, rows);
    for (int64_t r = 0; r < rows; ++r) {
      float* const h = shared_.hidden + r * s_.wide();
#pragma omp simd
      for (int64_t i = mine.first; i < mine.last; ++i) h[i] = activate<kGeluTanh>(h[i], 0.0f);
    }
    everyone_.wait();
    multiply(w_.down(l), {shared_.hidden, s_.wide(), shared_.x, width, true}, rows);
    everyone_.wait();
  }

  // logits [B, V] of each sample's last token; or [B, all, V] of every one, of a call of `all` tokens.
  void head(const Part& part, float* logits, int64_t all) {
    const int64_t width = s_.width(), tokens = all ? part.tokens : 1;
    for (int64_t b = 0; b < s_.batch; ++b) {
      for (int64_t t = 0; t < tokens; ++t) {
        const float* const x = shared_.x + ((b + 1) * part.tokens - tokens + t) * width;
        layer_norm(x, w_.last_norm(), w_.last_norm_bias(), s_.channels, s_.eps, normed_ + (b * tokens + t) * width);
      }
    }
    if (!all) {
      multiply(w_.head(), {normed_, width, logits, s_.vocabulary, false}, s_.batch);
      return;
    }
    for (int64_t b = 0; b < s_.batch; ++b) {
      float* const of_sample = logits + (b * all + part.first) * s_.vocabulary;
      multiply(w_.head(), {normed_ + b * tokens * width, width, of_sample, s_.vocabulary, false}, tokens);
    }
    everyone_.wait();
  }

 private:
  void norm(int64_t rows, const float* weight, const float* bias) {
    for (int64_t r = 0; r < rows; ++r) {
      layer_norm(shared_.x + r * s_.width(), weight, bias, s_.channels, s_.eps, normed_ + r * s_.width());
    }
  }

  Share multiply(const Linear<W>& m, const Vectors& v, int64_t count) {
    const Share mine(m.rows, kUnit);
    multiply_linear(m, mine.first, mine.last, v, count);
    return mine;
  }

  // Keys and values go to the cache [L][2][B][H][room][D]; then each head attends over what its cache holds.
  void attention(int64_t l, const Part& part) {
    const int64_t head_dim = s_.head_dim(), all = s_.batch * s_.heads, row = whole_vectors(3 * s_.channels);
    const int64_t before = length_ + part.first;
    const Share mine(all);
    for (int64_t item = mine.first; item < mine.last; ++item) {
      const int64_t b = item / s_.heads, at = item % s_.heads * head_dim;
      float* const keys = cache_ + (2 * l * all + item) * s_.room * head_dim;
      float* const values = keys + all * s_.room * head_dim;
      for (int64_t t = 0; t < part.tokens; ++t) {
        const float* const qkv = shared_.qkv + (b * part.tokens + t) * row + at;
        std::memcpy(keys + (before + t) * head_dim, qkv + s_.channels, size_t(head_dim) * sizeof(float));
        std::memcpy(values + (before + t) * head_dim, qkv + 2 * s_.channels, size_t(head_dim) * sizeof(float));
        float* const out = shared_.attended + (b * part.tokens + t) * s_.width() + at;
        attend({qkv, head_dim, 0.0f}, keys, values, before + t + 1, {query_, scores_}, out);
      }
    }
  }

  const Weights<W>& w_;
  const Sizes& s_;
  const Shared& shared_;
  Barrier& everyone_;
  float* const cache_;
  const int64_t length_;
  float *const normed_, *const query_, *const scores_;
};

template <class W>
void decode(const Weights<W>& weights, float* cache, const int64_t* ids, float* logits, int64_t tokens, int64_t length,
            bool every, int threads) {
  const Sizes& s = weights.size;
  const int64_t together = s.batch < kRows ? least(tokens, kRows / s.batch) : 1, rows = s.batch * together;
  const Shared shared(s, rows);
  Barrier everyone;
  const bool parallel = s.channels * (4 * s.channels + 2 * s.hidden) >= kParallelWeights;
  const Scratch scratch(Worker<W>::room(s, rows), parallel, threads);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    Worker<W> worker(weights, shared, everyone, cache, rows, length, scratch.mine());
    for (int64_t first = 0; first < tokens; first += together) {
      const Part part{first, least(together, tokens - first)};
      worker.embed(ids, tokens, part);
      for (int64_t l = 0; l < s.layers; ++l) worker.layer(l, part);
      if (every || first + part.tokens == tokens) worker.head(part, logits, every ? tokens : 0);
    }
  }
}

// tensors, scales: addresses, in the order of layout.py (scales: null but for int8). cache [L, 2, B, H, room, D] holds
// `length` tokens of each sample, ids [B, tokens] follow, logits [B, V] are of the last, or [B, tokens, V] of every
// one. dtype: of the matrices, 0 float32, 1 bfloat16, 2 int8.
void gpt_decode(const int64_t* tensors, const int64_t* scales, float* cache, const int64_t* ids, float* logits,
                int64_t layers, int64_t batch, int64_t heads, int64_t channels, int64_t hidden, int64_t vocabulary,
                int64_t room, int64_t tokens, int64_t length, double eps, int dtype, int every, int threads) {
  require_within("heads", heads, 1, channels);
  require_within("heads of channels", heads * (channels / heads), channels, channels);
  require_within("length", length, 0, room - tokens);
  for (int64_t i = 0; i < batch * tokens; ++i) require_within("ids", ids[i], 0, vocabulary - 1);
  if (batch == 0 || tokens == 0) return;
  const Sizes size{layers, batch, heads, channels, hidden, vocabulary, room, float(eps)};
  const bool all = every != 0;
  switch (dtype) {
    case 0: return decode(Weights<float>{tensors, nullptr, size}, cache, ids, logits, tokens, length, all, threads);
    case 1: return decode(Weights<uint16_t>{tensors, nullptr, size}, cache, ids, logits, tokens, length, all, threads);
    default: return decode(Weights<int8_t>{tensors, scales, size}, cache, ids, logits, tokens, length, all, threads);
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&gpt_decode>::named("gpt_decode"),
    {},
};
