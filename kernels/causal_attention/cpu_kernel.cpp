// Attention on the CPU (the tiles are those of cpu_tiles.h): forward by tiles of queries, backward by heads of keys.
#include "cpu_tiles.h"
#include "kernel.h"

namespace {

struct Forward {
  Settings s;
  Heads q, k, v, out;
  float* lse;

  int64_t room() const {
    return kTile * (4 * s.width() + 2 * kTile) + (s.seed ? stream_room(kTile) : 0) + 16;
  }

  template <bool Capped, int64_t Lanes>
  void run(const Sequence& sequence, int64_t head, int64_t query, float* memory) const {
    const int64_t queries = sequence.queries - query < Lanes ? sequence.queries - query : Lanes;
    const int64_t width = s.width(), key_head = head / (s.heads / s.key_heads), position = query + sequence.shift();
    float* const q_turned = memory;  // [channels][queries]
    float* const scores = q_turned + Lanes * width;
    float* const sum = scores + kTile * Lanes;  // [queries][width]
    float* const kept = sum + Lanes * width;
    float* const buffer = kept + kTile * Lanes;  // of rows of k, then of v, and of q
    uint32_t* const words = reinterpret_cast<uint32_t*>(buffer + 2 * kTile * width);
    transpose<Lanes>(rows_of(s, q, sequence, head, sequence.query + query, queries, buffer), queries, s.channels,
              Capped ? s.scale / s.cap : s.scale, q_turned);
    Online<Lanes> online;
    const Span span(s, sequence, query, queries);
    bool started = false;
    for (int64_t key = span.first; key < span.end; key += kTile) {
      const int64_t keys = span.end - key < kTile ? span.end - key : kTile;
      const Tile k_rows = rows_of(s, k, sequence, key_head, sequence.key + key, keys, buffer);
      multiply({k_rows.by_rows(), s.channels, q_turned, Lanes, scores, Lanes, false}, keys, Lanes);
      cap_scores<Capped>(scores, keys * Lanes, s.cap);
      if (partly(s, position, queries, key, keys)) hide<Lanes>(s, position, key, keys, -kInfinity, scores);
      online.take(scores, keys);
      if (started) {
        for (int64_t i = 0; i < queries; ++i) {
          const float factor = online.shrunk[i];
          if (factor == 1.0f) continue;
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) sum[i * width + c] *= factor;
        }
      }
      if (s.seed) {
        draw<Lanes>(s, sequence, head, query, queries, key, keys, words, kept);
#pragma omp simd
        for (int64_t i = 0; i < keys * Lanes; ++i) scores[i] = kept[i] == 0.0f ? 0.0f : scores[i] * kept[i];
      }
      const Tile v_rows = rows_of(s, v, sequence, key_head, sequence.key + key, keys, buffer + kTile * width);
      multiply({Tile{scores, Lanes}.by_columns(), keys, v_rows.data, v_rows.row, sum, width, started}, queries, width);
      started = true;
    }
    float* const row_lse = lse + (sequence.batch * s.heads + head) * s.queries + sequence.query + query;
    const float nothing = sequence.keys < 0 ? __builtin_nanf("") : 0.0f;  // what a query that sees no key gets
    for (int64_t i = 0; i < queries; ++i) {
      const float total = online.total[i], share = total == 0.0f ? 0.0f : 1.0f / total;
      row_lse[i] = online.most[i] + __builtin_logf(total) + nothing;
      float* const row = sum + i * width;
      for (int64_t c = 0; c < s.channels; ++c) row[c] = started ? row[c] * share : nothing;
      store(s, out, sequence, head, sequence.query + query + i, row);
    }
  }

  // A single query without dropout, whose products run along the channels instead.
  template <bool Capped>
  void one(const Sequence& sequence, int64_t head, float* memory) const {
    const int64_t width = s.width(), key_head = head / (s.heads / s.key_heads), position = sequence.shift();
    const float factor = Capped ? s.scale / s.cap : s.scale;
    float* const turned = memory;  // q times the factor
    float* const sum = turned + width;
    float* const scores = sum + width;
    float* const buffer = scores + kTile;  // of rows of q and k, then of v
    const Tile q_row = rows_of(s, q, sequence, head, sequence.query, 1, buffer);
    for (int64_t c = 0; c < width; ++c) turned[c] = q_row.data[c] * factor, sum[c] = 0.0f;
    float most = -kInfinity, total = 0.0f;
    const Span span(s, sequence, 0, 1);
    for (int64_t key = span.first; key < span.end; key += kTile) {
      const int64_t keys = span.end - key < kTile ? span.end - key : kTile;
      const Tile k_rows = rows_of(s, k, sequence, key_head, sequence.key + key, keys, buffer);
      for (int64_t j = 0; j < keys; ++j) {
        const float* const row = k_rows.data + j * k_rows.row;
        float product = 0.0f;
#pragma omp simd reduction(+ : product)
        for (int64_t c = 0; c < width; ++c) product += turned[c] * row[c];
        scores[j] = product;
      }
      cap_scores<Capped>(scores, keys, s.cap);
      if (partly(s, position, 1, key, keys)) {
        for (int64_t j = 0; j < keys; ++j) {
          const int64_t back = position - (key + j);
          if (back < s.least || back >= s.most) scores[j] = -kInfinity;
        }
      }
      float larger = most;
      for (int64_t j = 0; j < keys; ++j) larger = scores[j] > larger ? scores[j] : larger;
      const float shift = larger == -kInfinity ? 0.0f : larger, shrunk = exp_fast(most - shift);
      float weight = 0.0f;
#pragma omp simd reduction(+ : weight)
      for (int64_t j = 0; j < keys; ++j) {
        scores[j] = exp_fast(scores[j] - shift);
        weight += scores[j];
      }
      most = larger, total = total * shrunk + weight;
      const Tile v_rows = rows_of(s, v, sequence, key_head, sequence.key + key, keys, buffer + kTile * width);
      int64_t c = 0;
      for (; c + 4 * kWidth <= width; c += 4 * kWidth) add_rows<4>(v_rows, scores, keys, shrunk, c, sum);
      for (; c < width; c += kWidth) add_rows<1>(v_rows, scores, keys, shrunk, c, sum);
    }
    const float nothing = sequence.keys < 0 ? __builtin_nanf("") : 0.0f;  // what a query that sees no key gets
    lse[(sequence.batch * s.heads + head) * s.queries + sequence.query] = most + __builtin_logf(total) + nothing;
    const float share = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t c = 0; c < s.channels; ++c) sum[c] = span.first < span.end ? sum[c] * share : nothing;
    store(s, out, sequence, head, sequence.query, sum);
  }

  // sum = shrunk sum + weights times rows, in some vectors of channels from `at` on.
  template <int Vectors>
  static void add_rows(const Tile& rows, const float* weights, int64_t count, float shrunk, int64_t at, float* sum) {
    Vector added[Vectors];
    for (int i = 0; i < Vectors; ++i) added[i] = shrunk * *reinterpret_cast<const VectorAt*>(sum + at + i * kWidth);
    for (int64_t j = 0; j < count; ++j) {
      const float* const row = rows.data + j * rows.row + at;
      for (int i = 0; i < Vectors; ++i) added[i] += weights[j] * *reinterpret_cast<const VectorAt*>(row + i * kWidth);
    }
    for (int i = 0; i < Vectors; ++i) *reinterpret_cast<VectorAt*>(sum + at + i * kWidth) = added[i];
  }
};

// Which tile of queries the n-th job is: those with the most keys first.
struct Job {
  int64_t sequence, head, query;
};

// All tiles of queries of all sequences and heads.
struct Jobs {
  const int64_t count;
  const Memory<Job> jobs;

  static int64_t tiles(const Sequence& s) { return (s.queries + kTile - 1) / kTile; }
  static int64_t count_of(const Sequences& all, int64_t sequences, int64_t heads) {
    int64_t found = 0;
    for (int64_t n = 0; n < sequences; ++n) found += heads * tiles(all[n]);
    return found;
  }
  Jobs(const Sequences& all, int64_t sequences, int64_t heads)
      : count(count_of(all, sequences, heads)), jobs(count) {
    Job* next = jobs;
    for (int64_t n = 0; n < sequences; ++n) {
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t tile = tiles(all[n]); tile-- > 0;) *next++ = {n, head, tile * kTile};
      }
    }
  }
};

struct Backward {
  Settings s;
  Heads q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  const float* lse;
  const float* grad_lse;  // or null

  int64_t room(int64_t keys) const {
    return 2 * keys * s.width() + kTile * (8 * s.width() + 3 * kTile) + (s.seed ? stream_room(kTile) : 0) + 16;
  }

  // From scores and from products of the gradient with v: what multiplies the gradient (in place of the scores), and
  // what multiplies q and k.
  template <bool Capped, bool Dropped>
  void gradients(float* scores, float* products, const float* kept, const float* row_lse, const float* delta,
                 int64_t keys) const {
    for (int64_t j = 0; j < keys; ++j) {
      float* const p = scores + j * kTile;
      float* const d = products + j * kTile;
      const float* const factor = kept + j * kTile;
#pragma omp simd
      for (int64_t i = 0; i < kTile; ++i) {
        const float x = Capped ? tanh_fast(p[i]) : p[i];
        const float slope = Capped ? s.scale * (1.0f - x * x) : s.scale;
        const float weight = exp_fast((Capped ? s.cap * x : x) - row_lse[i]);
        const float product = Dropped ? (factor[i] == 0.0f ? 0.0f : d[i] * factor[i]) : d[i];
        d[i] = weight * (product - delta[i]) * slope;
        p[i] = Dropped ? weight * factor[i] : weight;
      }
    }
  }

  // All of one head of keys, in the order of the queries: `sum_k` and `sum_v` are its gradients so far.
  template <bool Capped>
  void run(const Sequence& sequence, int64_t key_head, float* memory) const {
    const int64_t width = s.width(), group = s.heads / s.key_heads;
    float* const sum_k = memory;
    float* const sum_v = sum_k + sequence.keys * width;
    float* const buffers = sum_v + sequence.keys * width;
    for (int64_t i = 0; i < 2 * sequence.keys * width; ++i) memory[i] = 0.0f;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      for (int64_t query = 0; query < sequence.queries; query += kTile) {
        queries_of<Capped>(sequence, head, key_head, query, sum_k, sum_v, buffers);
      }
    }
    for (int64_t key = 0; key < sequence.keys; ++key) {
      store(s, grad_k, sequence, key_head, sequence.key + key, sum_k + key * width);
      store(s, grad_v, sequence, key_head, sequence.key + key, sum_v + key * width);
    }
  }

  template <bool Capped>
  void queries_of(const Sequence& sequence, int64_t head, int64_t key_head, int64_t query, float* sum_k, float* sum_v,
                  float* memory) const {
    const int64_t queries = sequence.queries - query < kTile ? sequence.queries - query : kTile;
    const int64_t width = s.width(), position = query + sequence.shift(), first = sequence.query + query;
    float* const q_turned = memory;  // [channels][queries]
    float* const g_turned = q_turned + kTile * width;
    float* const scores = g_turned + kTile * width;
    float* const products = scores + kTile * kTile;
    float* const kept = products + kTile * kTile;
    float* const sum_q = kept + kTile * kTile;
    float* const buffer = sum_q + kTile * width;  // of rows of q, of the gradient, of k and of v
    uint32_t* const words = reinterpret_cast<uint32_t*>(buffer + 4 * kTile * width);
    const auto part = [&](int64_t n) { return buffer + n * kTile * width; };
    const Tile q_rows = rows_of(s, q, sequence, head, first, queries, part(0));
    const Tile g_rows = rows_of(s, grad_out, sequence, head, first, queries, part(1));
    const Tile out_rows = rows_of(s, out, sequence, head, first, queries, part(2));
    transpose<kTile>(q_rows, queries, s.channels, Capped ? s.scale / s.cap : s.scale, q_turned);
    transpose<kTile>(g_rows, queries, s.channels, 1.0f, g_turned);
    alignas(64) float row_lse[kTile], delta[kTile];
    const int64_t row = (sequence.batch * s.heads + head) * s.queries + first;
    for (int64_t i = 0; i < kTile; ++i) {
      row_lse[i] = kInfinity, delta[i] = 0.0f;
      if (i >= queries) continue;
      if (lse[row + i] != -kInfinity) row_lse[i] = lse[row + i];  // else it sees nothing
      const float* const g = g_rows.data + i * g_rows.row;
      const float* const o = out_rows.data + i * out_rows.row;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < s.channels; ++c) sum += g[c] * o[c];
      delta[i] = grad_lse ? sum - grad_lse[row + i] : sum;
    }
    const Span span(s, sequence, query, queries);
    bool started = false;
    for (int64_t key = span.first; key < span.end; key += kTile) {
      const int64_t keys = span.end - key < kTile ? span.end - key : kTile;
      const Tile k_rows = rows_of(s, k, sequence, key_head, sequence.key + key, keys, part(2));
      const Tile v_rows = rows_of(s, v, sequence, key_head, sequence.key + key, keys, part(3));
      multiply({k_rows.by_rows(), s.channels, q_turned, kTile, scores, kTile, false}, keys, kTile);
      multiply({v_rows.by_rows(), s.channels, g_turned, kTile, products, kTile, false}, keys, kTile);
      if (s.seed) draw<kTile>(s, sequence, head, query, queries, key, keys, words, kept);
      with_flag(s.seed != nullptr, [&](auto dropped) {
        gradients<Capped, decltype(dropped)::value>(scores, products, kept, row_lse, delta, keys);
      });
      if (partly(s, position, queries, key, keys)) {
        hide<kTile>(s, position, key, keys, 0.0f, scores);
        hide<kTile>(s, position, key, keys, 0.0f, products);
      }
      const Tile p{scores, kTile}, d{products, kTile};
      multiply({p.by_rows(), queries, g_rows.data, g_rows.row, sum_v + key * width, width, true}, keys, width);
      multiply({d.by_rows(), queries, q_rows.data, q_rows.row, sum_k + key * width, width, true}, keys, width);
      multiply({d.by_columns(), keys, k_rows.data, k_rows.row, sum_q, width, started}, queries, width);
      started = true;
    }
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t c = 0; !started && c < width; ++c) sum_q[i * width + c] = 0.0f;
      store(s, grad_q, sequence, head, first + i, sum_q + i * width);
    }
  }
};

Settings settings(int64_t heads, int64_t key_heads, int64_t queries, int64_t keys, int64_t channels, int dtype,
                  double scale, double cap, int64_t window, bool causal, const int64_t* seed, int64_t offset,
                  int64_t bound, double grown) {
  constexpr int64_t kFar = int64_t(1) << 40;  // beyond any key, and sums of positions do not overflow
  if (key_heads < 1 || heads % key_heads) {
    genai_fast_raise(Raised::kValueError, "k: expected a number of heads that divides the %lld of q, got %lld",
                     (long long)heads, (long long)key_heads);
  }
  if (window < 0) {
    genai_fast_raise(Raised::kValueError, "window: expected at least 0 (none), got %lld", (long long)window);
  }
  const int64_t most = window && window < kFar ? window : kFar, least = causal ? 0 : 1 - most;
  return {heads, key_heads, queries, keys, channels, float(scale), float(cap), least, most, seed, offset,
          uint32_t(bound), float(grown), dtype};
}

// Raises unless packed sequences begin at 0, in order, and end with the last of `rows`: all else is read by these.
void require_starts(const char* name, const int* starts, int64_t sequences, int64_t rows) {
  if (!starts) return;
  const auto refuse = [=](const char* expected, int64_t n) {
    genai_fast_raise(Raised::kValueError, "%s: expected %s for %lld packed rows, got %d at %lld", name, expected,
                     (long long)rows, starts[n], (long long)n);
  };
  if (starts[0] != 0) refuse("0 first", 0);
  for (int64_t n = 0; n < sequences; ++n) {
    if (starts[n + 1] < starts[n]) refuse("numbers that do not fall", n + 1);
  }
  if (starts[sequences] != rows) refuse("the number of rows last", sequences);
}

// Whether the scores are worth a second thread, whose start costs some microseconds.
bool worth(const Settings& s, const Sequences& all, int64_t sequences) {
  constexpr int64_t kMost = int64_t(1) << 17;
  int64_t products = 0;
  for (int64_t n = 0; n < sequences && products <= kMost; ++n) {
    products += s.heads * all[n].queries * all[n].keys * s.channels;
  }
  return products > kMost;
}

void attend(const Forward& forward, const Sequences& all, int64_t sequences, int threads) {
  const Jobs work(all, sequences, forward.s.heads);
  const bool few = all.queries <= kWidth, parallel = work.count > 1 && worth(forward.s, all, sequences);
  const Scratch scratch(forward.room(), parallel, threads);
  with_flag(forward.s.cap != 0.0f, [&](auto capped) {
    constexpr bool kCapped = decltype(capped)::value;
#pragma omp parallel num_threads(threads) if (parallel)
    {
      float* const memory = scratch.mine();
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < work.count; ++n) {
        const Job& job = work.jobs[n];
        if (all.lengths && all.queries == 1) {
          forward.template one<kCapped>(all[job.sequence], job.head, memory);
        } else if (few) {
          forward.template run<kCapped, kWidth>(all[job.sequence], job.head, job.query, memory);
        } else {
          forward.template run<kCapped, kTile>(all[job.sequence], job.head, job.query, memory);
        }
      }
    }
  });
}

// Strides of tensors by address: three each, in the order of the tensors.
struct Strides {
  const int64_t* values;
  Heads of(const void* data, int n) const { return {data, values[3 * n], values[3 * n + 1], values[3 * n + 2]}; }
};

void causal_attention(const void* q, const void* k, const void* v, const void* out, const int64_t* strides, float* lse,
                      const int* starts_q, const int* starts_k, int64_t sequences, int64_t heads, int64_t key_heads,
                      int64_t queries, int64_t keys, int64_t channels, int dtype, double scale, double cap,
                      int64_t window, bool causal, const int64_t* seed, int64_t offset, int64_t bound, double grown,
                      int threads) {
  const Settings s = settings(heads, key_heads, queries, keys, channels, dtype, scale, cap, window, causal, seed,
                              offset, bound, grown);
  require_starts("cu_seqlens_q", starts_q, sequences, queries);
  require_starts("cu_seqlens_k", starts_k, sequences, keys);
  const Strides by{strides};
  const Forward forward{s, by.of(q, 0), by.of(k, 1), by.of(v, 2), by.of(out, 3), lse};
  attend(forward, {starts_q, starts_k, queries, keys, nullptr}, sequences, threads);
}

// Appends rows to caches, then attends over what each sample's cache holds: `held` becomes that, -1 where it has no room,
// whose results are NaN.
void decode_attention(const void* q, const void* k_cache, const void* v_cache, const void* out, const void* k,
                      const void* v, const int64_t* strides, float* lse, const int* lengths, int* held, int64_t batch, int64_t heads,
                      int64_t key_heads, int64_t queries, int64_t room, int64_t channels, int dtype, double scale,
                      double cap, int64_t window, int threads) {
  const Settings s = settings(heads, key_heads, queries, room, channels, dtype, scale, cap, window, true, nullptr, 0, 0,
                              1.0);
  const Strides by{strides};
  const Forward forward{s, by.of(q, 0), by.of(k_cache, 1), by.of(v_cache, 2), by.of(out, 3), lse};
  const int64_t added = k ? queries : 0;
  for (int64_t n = 0; n < batch; ++n) {
    const bool fits = lengths[n] >= 0 && lengths[n] + added <= room;
    const Sequence sample{n, 0, queries, 0, room};
    for (int64_t head = 0; fits && head < key_heads; ++head) {
      for (int64_t row = 0; row < added; ++row) {
        const auto append = [&](const Heads& cache, const Heads& rows) {
          std::memcpy(const_cast<char*>(at(s, cache, sample, head, lengths[n] + row)), at(s, rows, sample, head, row),
                      size_t(channels * s.size()));
        };
        append(forward.k, by.of(k, 4));
        append(forward.v, by.of(v, 5));
      }
    }
    held[n] = fits ? int(lengths[n] + added) : -1;
  }
  attend(forward, {nullptr, nullptr, queries, room, held}, batch, threads);
}

void causal_attention_backward(const void* q, const void* k, const void* v, const void* out, const void* grad_out,
                               const void* grad_q, const void* grad_k, const void* grad_v, const int64_t* strides,
                               const float* lse, const float* grad_lse, const int* starts_q, const int* starts_k,
                               int64_t sequences, int64_t heads, int64_t key_heads, int64_t queries, int64_t keys,
                               int64_t channels, int dtype, double scale, double cap, int64_t window, bool causal,
                               const int64_t* seed, int64_t offset, int64_t bound, double grown, int threads) {
  const Settings s = settings(heads, key_heads, queries, keys, channels, dtype, scale, cap, window, causal, seed,
                              offset, bound, grown);
  require_starts("cu_seqlens_q", starts_q, sequences, queries);
  require_starts("cu_seqlens_k", starts_k, sequences, keys);
  const Strides by{strides};
  const Backward backward{s, by.of(q, 0), by.of(k, 1), by.of(v, 2), by.of(out, 3), by.of(grad_out, 4),
                          by.of(grad_q, 5), by.of(grad_k, 6), by.of(grad_v, 7), lse, grad_lse};
  const Sequences all{starts_q, starts_k, queries, keys, nullptr};
  const bool parallel = sequences * key_heads > 1 && worth(s, all, sequences);
  int64_t longest = 0;
  for (int64_t n = 0; n < sequences; ++n) longest = all[n].keys > longest ? all[n].keys : longest;
  const Scratch scratch(backward.room(longest), parallel, threads);
  with_flag(cap != 0.0, [&](auto capped) {
#pragma omp parallel num_threads(threads) if (parallel)
    {
      float* const memory = scratch.mine();
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < sequences * key_heads; ++n) {
        backward.template run<decltype(capped)::value>(all[n / key_heads], n % key_heads, memory);
      }
    }
  });
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&causal_attention>::named("causal_attention"),
    Entry<&causal_attention_backward>::named("causal_attention_backward"),
    Entry<&decode_attention>::named("decode_attention"),
    {},
};
