// New samples through all layers of a WaveNet, which remembers of each layer what its taps look back to. A call makes
// many samples: some sequences pass all layers together, position by position, in one thread.
#include <omp.h>

#include "activations.h"
#include "kernel.h"
#include "matmul.h"
#include "memory.h"
#include "team.h"

#include <cstring>

namespace {

constexpr int64_t kRowsTogether = 6;  // sequences that meet a weight while it is in a register
constexpr int64_t kOfLayer = 4;  // tensors: layout.py

struct Net {
  const int64_t *tensors, *dilations;
  int64_t layers, levels, width, skip, kernel, room;

  const float* tensor(int64_t k) const { return reinterpret_cast<const float*>(tensors[k]); }
  const float* of_layer(int64_t l, int64_t k) const { return tensor(1 + l * kOfLayer + k); }
  const float* last(int64_t k) const { return tensor(1 + layers * kOfLayer + k); }
};

// out [rows, columns] += x [rows, depth] matrix [depth, padded(columns)]; x's rows are `x_row` apart.
void add_product(const float* x, int64_t x_row, int64_t rows, int64_t depth, const float* matrix, int64_t columns,
                 float* out) {
  const int64_t wide = padded(columns);
  multiply({Strided::rows(x, x_row), depth, matrix, wide, out, wide, true}, rows, wide);
}

void fill(float* out, int64_t rows, const float* bias, int64_t columns) {
  const int64_t wide = padded(columns);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * wide, bias, size_t(wide) * sizeof(float));
}

void relu(float* x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = activate<kRelu>(x[i], 0.0f);
}

// The level that `uniform` falls on among the softmax of logits / temperature; at 0 the likeliest.
int64_t draw(const float* logits, int64_t levels, float temperature, float uniform, float* p) {
  int64_t best = 0;
  for (int64_t v = 1; v < levels; ++v) best = logits[v] > logits[best] ? v : best;
  if (temperature == 0.0f) return best;
  const float most = logits[best], scale = 1.0f / temperature;
#pragma omp simd
  for (int64_t v = 0; v < levels; ++v) p[v] = exp_fast((logits[v] - most) * scale);
  float total = 0.0f;
  for (int64_t v = 0; v < levels; ++v) p[v] = total += p[v];
  const float limit = uniform * total;
  for (int64_t v = 0; v < levels; ++v) {
    if (p[v] > limit) return v;
  }
  return best;
}

// What one thread does with sequences first .. first + rows - 1.
class Worker {
 public:
  Worker(const Net& net, float* cache, const float* condition, int64_t batch, int64_t first, int64_t rows, float* memory)
      : net_(net), cache_(cache + first * net.room * net.width), condition_(condition), batch_(batch), first_(first),
        rows_(rows), x_(memory), z_(x_ + kRowsTogether * padded(net.width)),
        h_(z_ + kRowsTogether * padded(2 * net.width)), skip_(h_ + kRowsTogether * padded(net.width)),
        hidden_(skip_ + kRowsTogether * padded(net.skip)),
        logits_(hidden_ + kRowsTogether * padded(net.skip)) {}
  static int64_t memory(const Net& net) {
    return kRowsTogether * (2 * padded(net.width) + padded(2 * net.width) + 2 * padded(net.skip) +
                            padded(net.levels)) + padded(net.levels);
  }

  // One position, whose codes are codes[r code_row]: the logits of the next, [rows, padded(levels)].
  const float* step(int64_t position, const int64_t* codes, int64_t code_row) {
    const int64_t width = net_.width, wide = padded(width), skip_wide = padded(net_.skip);
    for (int64_t r = 0; r < rows_; ++r) {
      std::memcpy(x_ + r * wide, net_.tensor(0) + codes[r * code_row] * width, size_t(width) * sizeof(float));
    }
    fill(skip_, rows_, net_.last(0), net_.skip);
    int64_t offset = 0;
    for (int64_t l = 0; l < net_.layers; ++l) {
      layer(l, position, offset);
      offset += (net_.kernel - 1) * net_.dilations[l];
    }
    relu(skip_, rows_ * skip_wide);
    fill(hidden_, rows_, net_.last(2), net_.skip);
    add_product(skip_, skip_wide, rows_, net_.skip, net_.last(1), net_.skip, hidden_);
    relu(hidden_, rows_ * skip_wide);
    fill(logits_, rows_, net_.last(4), net_.levels);
    add_product(hidden_, skip_wide, rows_, net_.skip, net_.last(3), net_.levels, logits_);
    return logits_;
  }

  float* after_logits() const { return logits_ + kRowsTogether * padded(net_.levels); }

 private:
  void layer(int64_t l, int64_t position, int64_t offset) {
    const int64_t width = net_.width, wide = padded(width), both = padded(2 * width);
    const int64_t held = (net_.kernel - 1) * net_.dilations[l], sample = net_.room * width;
    for (int64_t r = 0; r < rows_; ++r) {
      const float* const given = condition_ + (l * batch_ + first_ + r) * 2 * width;
      std::memcpy(z_ + r * both, given, size_t(2 * width) * sizeof(float));
    }
    for (int64_t k = 0; k < net_.kernel; ++k) {
      const int64_t back = (net_.kernel - 1 - k) * net_.dilations[l];
      const float* const taps = net_.of_layer(l, 0) + k * width * both;
      if (back == 0) {
        add_product(x_, wide, rows_, width, taps, 2 * width, z_);
      } else if (position >= back) {
        const float* const seen = cache_ + (offset + (position - back) % held) * width;
        add_product(seen, sample, rows_, width, taps, 2 * width, z_);
      }
    }
    for (int64_t r = 0; r < rows_; ++r) {
      if (held) {
        float* const slot = cache_ + r * sample + (offset + position % held) * width;
        std::memcpy(slot, x_ + r * wide, size_t(width) * sizeof(float));
      }
      const float* const z = z_ + r * both;
      float* const h = h_ + r * wide;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) h[i] = tanh_fast(z[i]) * sigmoid(z[width + i]);
    }
    add_product(h_, wide, rows_, width, net_.of_layer(l, 1), net_.skip, skip_);
    if (l + 1 == net_.layers) return;
    add_product(h_, wide, rows_, width, net_.of_layer(l, 2), width, x_);
    const float* const bias = net_.of_layer(l, 3);
    for (int64_t r = 0; r < rows_; ++r) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) x_[r * wide + i] += bias[i];
    }
  }

  const Net& net_;
  float* const cache_;
  const float* const condition_;
  const int64_t batch_, first_, rows_;
  float *const x_, *const z_, *const h_, *const skip_, *const hidden_, *const logits_;
};

// tensors: addresses, in the order of layout.py. codes [B, steps + 1], of which the first `given` are known; cache
// [B, room, width]; condition [layers, B, 2 width]; uniforms [B, steps]; logits [B, steps, levels] or null.
void wavenet_decode(const int64_t* tensors, const int64_t* dilations, int64_t* codes, float* cache,
                    const float* uniforms, const float* condition, float* logits, int64_t batch, int64_t steps,
                    int64_t given, int64_t start, int64_t layers, int64_t levels, int64_t width, int64_t skip,
                    int64_t kernel, int64_t room, double temperature, int threads) {
  const int64_t code_row = steps + 1;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < least(given, code_row); ++t) {
      const int64_t code = codes[b * code_row + t];
      if (code < 0 || code >= levels) {
        genai_fast_raise(Raised::kValueError, "codes: expected 0 to %lld, got %lld", (long long)levels - 1,
                         (long long)code);
      }
    }
  }
  const Net net{tensors, dilations, layers, levels, width, skip, kernel, room};
  const int64_t each = least(kRowsTogether, (batch + threads - 1) / threads);
  const int64_t parts = each ? (batch + each - 1) / each : 0;
  const bool parallel = parts > 1;
  const Scratch scratch(Worker::memory(net), parallel, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * each, rows = least(each, batch - first), wide = padded(levels);
    std::memset(scratch.mine(), 0, size_t(Worker::memory(net)) * sizeof(float));
    Worker worker(net, cache, condition, batch, first, rows, scratch.mine());
    for (int64_t t = 0; t < steps; ++t) {
      int64_t* const code = codes + first * code_row + t;
      const float* const found = worker.step(start + t, code, code_row);
      for (int64_t r = 0; r < rows; ++r) {
        const float* const row = found + r * wide;
        const int64_t b = first + r;
        if (logits) std::memcpy(logits + (b * steps + t) * levels, row, size_t(levels) * sizeof(float));
        if (t + 1 < given) continue;
        code[r * code_row + 1] = draw(row, levels, float(temperature), uniforms[b * steps + t], worker.after_logits());
      }
    }
  }
}

}  // namespace

GENAI_FAST_TABLE = {
    Entry<&wavenet_decode>::named("wavenet_decode"),
    {},
};
