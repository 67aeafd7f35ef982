// New tokens through all layers of a Llama, in float32 with matrices in float32, bfloat16 or int8, and a cache of keys and
// values in float32 or bfloat16.
//
// One parallel region a call, in which threads meet six times a layer. Each owns the same share of rows of every matrix;
// what is short, the norms, each computes for itself.
#include "activations.h"
#include "decoding.h"
#include "kernel.h"
#include "memory.h"
#include "team.h"

namespace {

constexpr int64_t kRows = 64;               // tokens that pass through a layer together: a prompt goes in such parts
constexpr int64_t kUnit = 16;               // rows of a matrix: results of two threads lie in different cache lines
constexpr int64_t kParallelWeights = 1 << 16;  // weights of a layer that are worth a second thread
// Tensors and matrices of a layer; places of its tensors in the order of layout.py. A bias follows its matrix.
constexpr int64_t kTensors = 18, kMatrices = 7;
enum Tensor : int64_t { kNorm = 0, kQ = 1, kK = 3, kV = 5, kQNorm = 7, kKNorm = 8, kO = 9, kNorm2 = 11, kGate = 12,
                        kUp = 14, kDown = 16 };

struct Sizes {
  int64_t layers, batch, heads, kv_heads, head_dim, channels, hidden, vocabulary, room;
  float softcap, eps;
  int64_t q_width() const { return whole_vectors(heads * head_dim); }
  int64_t kv_width() const { return whole_vectors(kv_heads * head_dim); }
  int64_t width() const { return whole_vectors(channels); }
  int64_t wide() const { return whole_vectors(hidden); }
};

// Addresses of tensors in the order of layout.py, null of absent ones; `scales` has one for each matrix, or is null.
template <class W>
struct Weights {
  const int64_t *tensors, *scales, *windows;
  const float *cos, *sin;  // [positions, head_dim / 2]
  Sizes size;

  const float* vector(int64_t k) const { return reinterpret_cast<const float*>(tensors[k]); }
  const float* scale(int64_t k) const { return scales ? reinterpret_cast<const float*>(scales[k]) : nullptr; }
  const W* matrix(int64_t k) const { return reinterpret_cast<const W*>(tensors[k]); }

  const float* vector(int64_t layer, int64_t k) const { return vector(1 + layer * kTensors + k); }
  // Matrix j = 0 .. 6 of a layer, whose weight is tensor k.
  Linear<W> linear(int64_t layer, int64_t j, int64_t k, int64_t rows, int64_t depth) const {
    const int64_t at = 1 + layer * kTensors + k;
    return {matrix(at), scale(1 + layer * kMatrices + j), vector(at + 1), rows, depth};
  }
  Linear<W> q(int64_t l) const { return linear(l, 0, kQ, size.heads * size.head_dim, size.channels); }
  Linear<W> k(int64_t l) const { return linear(l, 1, kK, size.kv_heads * size.head_dim, size.channels); }
  Linear<W> v(int64_t l) const { return linear(l, 2, kV, size.kv_heads * size.head_dim, size.channels); }
  Linear<W> o(int64_t l) const { return linear(l, 3, kO, size.channels, size.heads * size.head_dim); }
  Linear<W> gate(int64_t l) const { return linear(l, 4, kGate, size.hidden, size.channels); }
  Linear<W> up(int64_t l) const { return linear(l, 5, kUp, size.hidden, size.channels); }
  Linear<W> down(int64_t l) const { return linear(l, 6, kDown, size.channels, size.hidden); }
  const float* last_norm() const { return vector(1 + size.layers * kTensors); }
  Linear<W> head() const {
    return {matrix(2 + size.layers * kTensors), scale(1 + size.layers * kMatrices), nullptr, size.vocabulary,
            size.channels};
  }
};

void rms_norm(const float* x, const float* weight, int64_t channels, float eps, float* y) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < channels; ++i) squares += x[i] * x[i];
  const float rrms = 1.0f / __builtin_sqrtf(squares / float(channels) + eps);
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) y[i] = x[i] * rrms * weight[i];
}

// Pairs (x[i], x[i + half]) turned by the angles of one position.
void turn(float* x, const float* cos, const float* sin, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

inline void put(const float* x, int64_t count, float* y) { std::memcpy(y, x, size_t(count) * sizeof(float)); }
inline void put(const float* x, int64_t count, uint16_t* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = to_bfloat16(x[i]);
}

// Memory of the tokens that are on their way, which all threads share: rows with zeros up to a whole vector.
struct Shared {
  const Memory<float> x;
  float *const q, *const k, *const v, *const attended, *const gate, *const up;
  Shared(const Sizes& s, int64_t rows)
      : x(rows * each(s)), q(x + rows * s.width()), k(q + rows * s.q_width()), v(k + rows * s.kv_width()),
        attended(v + rows * s.kv_width()), gate(attended + rows * s.q_width()), up(gate + rows * s.wide()) {
    std::memset(x, 0, size_t(rows * each(s)) * sizeof(float));
  }
  static int64_t each(const Sizes& s) { return s.width() + 2 * s.q_width() + 2 * s.kv_width() + 2 * s.wide(); }
};

// Tokens first .. first + tokens - 1 of each sample: row b tokens + t.
struct Part {
  int64_t first, tokens;
};

// What one thread does; W: of the matrices, C: of the cache.
template <class W, class C>
class Worker {
 public:
  // `memory` has room(s, rows) floats.
  Worker(const Weights<W>& weights, const Shared& shared, Barrier& everyone, C* cache, int64_t rows, int64_t length,
         float* memory)
      : w_(weights), s_(weights.size), shared_(shared), everyone_(everyone), cache_(cache), length_(length),
        normed_(memory), query_(normed_ + rows * s_.width()), scores_(query_ + whole_vectors(s_.head_dim)) {
    std::memset(memory, 0, size_t(scores_ - memory) * sizeof(float));
  }
  static int64_t room(const Sizes& s, int64_t rows) { return rows * s.width() + whole_vectors(s.head_dim) + s.room; }

  void embed(const int64_t* ids, int64_t ids_row, const Part& part) {
    const int64_t rows = s_.batch * part.tokens, channels = s_.channels;
    const Share mine(rows);
    for (int64_t r = mine.first; r < mine.last; ++r) {
      const int64_t id = ids[r / part.tokens * ids_row + part.first + r % part.tokens];
      const float scale = w_.scale(0) ? w_.scale(0)[id] : 1.0f;
      const W* const token = w_.matrix(0) + id * channels;
      float* const x = shared_.x + r * s_.width();
      for (int64_t i = 0; i < channels; ++i) x[i] = widen(token[i]) * scale;
    }
    everyone_.wait();
  }

  void layer(int64_t l, const Part& part) {
    const int64_t rows = s_.batch * part.tokens, width = s_.width(), wide = s_.wide();
    norm(rows, w_.vector(l, kNorm));
    multiply(w_.q(l), {normed_, width, shared_.q, s_.q_width(), false}, rows);
    multiply(w_.k(l), {normed_, width, shared_.k, s_.kv_width(), false}, rows);
    multiply(w_.v(l), {normed_, width, shared_.v, s_.kv_width(), false}, rows);
    everyone_.wait();
    store(l, part);
    everyone_.wait();
    attention(l, part);
    everyone_.wait();
    multiply(w_.o(l), {shared_.attended, s_.q_width(), shared_.x, width, true}, rows);
    everyone_.wait();
    norm(rows, w_.vector(l, kNorm2));
    multiply(w_.gate(l), {normed_, width, shared_.gate, wide, false}, rows);
    const Share mine = multiply(w_.up(l), {normed_, width, shared_.up, wide, false}, rows);
    for (int64_t r = 0; r < rows; ++r) {
      float *const gate = shared_.gate + r * wide, *const up = shared_.up + r * wide;
#pragma omp simd
      for (int64_t i = mine.first; i < mine.last; ++i) gate[i] = activate<kSilu>(gate[i], 0.0f) * up[i];
    }
    everyone_.wait();
    multiply(w_.down(l), {shared_.gate, wide, shared_.x, width, true}, rows);
    everyone_.wait();
  }

  // logits [B, V] of each sample's last token; or [B, all, V] of every one, of a call of `all` tokens.
  void head(const Part& part, float* logits, int64_t all) {
    const int64_t width = s_.width(), tokens = all ? part.tokens : 1;
    for (int64_t b = 0; b < s_.batch; ++b) {
      for (int64_t t = 0; t < tokens; ++t) {
        const float* const x = shared_.x + ((b + 1) * part.tokens - tokens + t) * width;
        rms_norm(x, w_.last_norm(), s_.channels, s_.eps, normed_ + (b * tokens + t) * width);
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
  void norm(int64_t rows, const float* weight) {
    for (int64_t r = 0; r < rows; ++r) {
      rms_norm(shared_.x + r * s_.width(), weight, s_.channels, s_.eps, normed_ + r * s_.width());
    }
  }

  Share multiply(const Linear<W>& m, const Vectors& v, int64_t count) {
    const Share mine(m.rows, kUnit);
    multiply_linear(m, mine.first, mine.last, v, count);
    return mine;
  }

  // One head of one token at its position: its norm, if there is one, and its rotation.
  void prepare(float* x, const float* norm, int64_t position) {
    const int64_t half = s_.head_dim / 2;
    if (norm) rms_norm(x, norm, s_.head_dim, s_.eps, x);
    turn(x, w_.cos + position * half, w_.sin + position * half, half);
  }

  C* keys(int64_t l, int64_t b, int64_t head) const {
    const int64_t all = s_.batch * s_.kv_heads;
    return cache_ + (2 * l * all + b * s_.kv_heads + head) * s_.room * s_.head_dim;
  }
  int64_t to_values() const { return s_.batch * s_.kv_heads * s_.room * s_.head_dim; }

  // Keys and values go to the cache [L][2][B][H_kv][room][D].
  void store(int64_t l, const Part& part) {
    const int64_t head_dim = s_.head_dim, row = s_.kv_width(), before = length_ + part.first;
    const Share mine(s_.batch * s_.kv_heads);
    for (int64_t item = mine.first; item < mine.last; ++item) {
      const int64_t b = item / s_.kv_heads, head = item % s_.kv_heads;
      C* const to = keys(l, b, head) + before * head_dim;
      for (int64_t t = 0; t < part.tokens; ++t) {
        const int64_t at = (b * part.tokens + t) * row + head * head_dim;
        prepare(shared_.k + at, w_.vector(l, kKNorm), before + t);
        put(shared_.k + at, head_dim, to + t * head_dim);
        put(shared_.v + at, head_dim, to + to_values() + t * head_dim);
      }
    }
  }

  // Each head attends over what the cache of its keys holds, or the last tokens of it.
  void attention(int64_t l, const Part& part) {
    const int64_t head_dim = s_.head_dim, row = s_.q_width(), before = length_ + part.first;
    const int64_t group = s_.heads / s_.kv_heads, window = w_.windows[l] > 0 ? w_.windows[l] : s_.room;
    const Share mine(s_.batch * s_.heads);
    for (int64_t item = mine.first; item < mine.last; ++item) {
      const int64_t b = item / s_.heads, head = item % s_.heads;
      const C* const held = keys(l, b, head / group);
      for (int64_t t = 0; t < part.tokens; ++t) {
        const int64_t at = (b * part.tokens + t) * row + head * head_dim, end = before + t + 1;
        const int64_t begin = end > window ? end - window : 0;
        prepare(shared_.q + at, w_.vector(l, kQNorm), before + t);
        const C* const from = held + begin * head_dim;
        attend({shared_.q + at, head_dim, s_.softcap}, from, from + to_values(), end - begin, {query_, scores_},
               shared_.attended + at);
      }
    }
  }

  const Weights<W>& w_;
  const Sizes& s_;
  const Shared& shared_;
  Barrier& everyone_;
  C* const cache_;
  const int64_t length_;
  float *const normed_, *const query_, *const scores_;
};

template <class W, class C>
void decode(const Weights<W>& weights, C* cache, const int64_t* ids, float* logits, int64_t tokens, int64_t length,
            bool every, int threads) {
  const Sizes& s = weights.size;
  const int64_t together = s.batch < kRows ? least(tokens, kRows / s.batch) : 1, rows = s.batch * together;
  const Shared shared(s, rows);
  Barrier everyone;
  const int64_t of_attention = 2 * (s.heads + s.kv_heads) * s.head_dim;
  const bool parallel = s.channels * (of_attention + 3 * s.hidden) >= kParallelWeights;
  const Scratch scratch(Worker<W, C>::room(s, rows), parallel, threads);
#pragma omp parallel num_threads(threads) if (parallel)
  {
    Worker<W, C> worker(weights, shared, everyone, cache, rows, length, scratch.mine());
    for (int64_t first = 0; first < tokens; first += together) {
      const Part part{first, least(together, tokens - first)};
      worker.embed(ids, tokens, part);
      for (int64_t l = 0; l < s.layers; ++l) worker.layer(l, part);
      if (every || first + part.tokens == tokens) worker.head(part, logits, every ? tokens : 0);
    }
  }
}

struct Call {
  const int64_t *tensors, *scales, *windows;
  const float *cos, *sin;
  void* cache;
  const int64_t* ids;
  float* logits;
  int64_t tokens, length;
  bool every;
  int threads;
};

template <class W>
void decode_by_cache(const Call& c, const Sizes& size, bool narrow_cache) {
  const Weights<W> weights{c.tensors, c.scales, c.windows, c.cos, c.sin, size};
  if (narrow_cache) {
    decode(weights, static_cast<uint16_t*>(c.cache), c.ids, c.logits, c.tokens, c.length, c.every,
           c.threads);
  } else {
    decode(weights, static_cast<float*>(c.cache), c.ids, c.logits, c.tokens, c.length, c.every,
           c.threads);
  }
}

// tensors, scales: addresses, in the order of layout.py (scales: null but for int8). windows: of each layer, 0 for all.
// cos, sin [positions, D / 2]. cache [L, 2, B, H_kv, room, D] holds `length` tokens of each sample, ids [B, tokens]
// follow, logits [B, V] are of the last, or [B, tokens, V] of every one. dtype: of the matrices, 0 float32, 1 bfloat16,
// 2 int8; cache_dtype: 0 or 1.
void llama_decode(const int64_t* tensors, const int64_t* scales, const int64_t* windows, const float* cos,
                  const float* sin, void* cache, const int64_t* ids, float* logits, int64_t layers, int64_t batch,
                  int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t channels, int64_t hidden,
                  int64_t vocabulary, int64_t room, int64_t tokens, int64_t length, double softcap, double eps,
                  int dtype, int cache_dtype, int every, int threads) {
  require_within("kv_heads", kv_heads, 1, heads);
  require_within("heads of kv_heads", kv_heads * (heads / kv_heads), heads, heads);
  require_within("head_dim of pairs", head_dim % 2, 0, 0);
  require_within("length", length, 0, room - tokens);
  for (int64_t i = 0; i < batch * tokens; ++i) require_within("ids", ids[i], 0, vocabulary - 1);
  if (batch == 0 || tokens == 0) return;
  const Sizes size{layers, batch, heads, kv_heads, head_dim, channels, hidden, vocabulary, room, float(softcap),
                   float(eps)};
  const Call call{tensors, dtype == 2 ? scales : nullptr, windows, cos, sin, cache, ids, logits, tokens, length,
                  every != 0, threads};
  switch (dtype) {
    case 0: return decode_by_cache<float>(call, size, cache_dtype == 1);
    case 1: return decode_by_cache<uint16_t>(call, size, cache_dtype == 1);
    default: return decode_by_cache<int8_t>(call, size, cache_dtype == 1);
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&llama_decode>::named("llama_decode"),
    {},
};
