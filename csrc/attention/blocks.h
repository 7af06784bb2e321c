// What the forward and the backward pass of attention share: shapes, packing, the loop over tasks.
#pragma once
#include <omp.h>

#include <cmath>

#include "../common/gemm.h"
#include "../common/parallel.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kRows = 96;   // queries per block: a multiple of every tile height
constexpr int64_t kKeys = 256;  // keys per block; measured on Zen 3: 48 x 128 is 2 % slower forward, 4 % backward
constexpr int64_t kPanel = (VL == 16 ? 4 : 2) * VL;  // keys side by side in a packed panel: the widest even tile
constexpr int64_t kChain = 128;  // products added up in one go: longer chains lose to eager PyTorch
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kInfinity = __builtin_inff();

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Element (b, s, h, 0) of a [B,S,H,D] tensor.
char* head_row(const Tensor& t, int64_t b, int64_t s, int64_t h) {
  return t.data + (b * t.stride[0] + s * t.stride[1] + h * t.stride[2]) * element_size(t.dtype);
}

struct Shape {
  int64_t B, Sq, Sk, H, Hkv, D;
  int64_t width;  // D in whole vectors
  int64_t ld;     // floats per row in scratch: odd in cache lines, or column strips would fight for the same L1 sets
  Shape(const Tensor& q, const Tensor& k)
      : B(q.size[0]), Sq(q.size[1]), Sk(k.size[1]), H(q.size[2]), Hkv(k.size[2]), D(q.size[3]),
        width(round_up(D, VL)), ld(width % 32 ? width : width + 16) {}
  int64_t group() const { return H / Hkv; }
  int64_t pairs() const { return B * Hkv; }
  int64_t panel_floats() const { return width * kPanel; }
  int64_t transposed_floats() const { return ceil_div(Sk, kPanel) * panel_floats(); }
  int64_t row_floats() const { return Sk * ld; }
  int64_t bias_floats() const { return round_up(Sk, kPanel); }
};

// Keys that sample b may see.
int64_t visible_keys(const Tensor& kv_lengths, int64_t b, int64_t Sk) {
  if (!kv_lengths) return Sk;
  const int64_t n = reinterpret_cast<const int32_t*>(kv_lengths.data)[b * kv_lengths.stride[0]];
  return n < 0 ? 0 : n > Sk ? Sk : n;
}

// Asks for up to `rows` rows of one head, from s on: they lie far apart, out of the hardware prefetcher's sight. near: into
// L1, to be read at once; else into L2.
template <bool write, bool near = true>
void prefetch_rows(const Shape& shape, const Tensor& t, int64_t b, int64_t s, int64_t h, int64_t rows) {
  const int64_t bytes = shape.D * element_size(t.dtype);
  for (; rows > 0 && s < t.size[1]; --rows, ++s) {
    const char* row = head_row(t, b, s, h);
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(row + line, write, near ? 3 : 2);
  }
}

// `rows` rows of one head as float32, zeros beyond D.
void load_rows(float* to, const Shape& shape, const Tensor& t, int64_t b, int64_t s, int64_t h, int64_t rows) {
  constexpr int64_t kAhead = 12;
  with_type(t.dtype, [&](auto type) {
    for (int64_t i = 0; i < rows; ++i, to += shape.ld) {
      prefetch_rows<false>(shape, t, b, s + i + kAhead, h, 1);
      const auto* row = reinterpret_cast<const decltype(type)*>(head_row(t, b, s + i, h));
      each_vector(shape.D, [&](int64_t d, int n) { store(to + d, get(row + d, n)); });
    }
  });
}

// Rows [begin, begin + kPanel) below `end` as one panel [units][kPanel]; missing keys are zeros. T: what a row of one head
// consists of, `units` of them.
template <class T>
void pack_panel(int32_t* to, const Shape& shape, const Tensor& t, int64_t b, int64_t begin, int64_t end, int64_t h,
                int64_t units) {
  for (int64_t j = begin; j < begin + kPanel; j += VL, to += VL) {
    prefetch_rows<false>(shape, t, b, j + VL, h, VL);
    const T* rows[VL];
    for (int i = 0; i < VL; ++i) rows[i] = reinterpret_cast<const T*>(j + i < end ? head_row(t, b, j + i, h) : nullptr);
    each_vector(units, [&](int64_t d, int n) {
      vi block[VL];
      for (int i = 0; i < VL; ++i) block[i] = rows[i] ? (vi)get(rows[i] + d, n) : vi{};
      transpose(block);
      for (int i = 0; i < n; ++i) store(to + (d + i) * kPanel, block[i]);
    });
  }
}
void pack_panel(float* to, const Shape& shape, const Tensor& t, int64_t b, int64_t begin, int64_t end, int64_t h) {
  with_type(t.dtype, [&](auto type) {
    pack_panel<decltype(type)>(reinterpret_cast<int32_t*>(to), shape, t, b, begin, end, h, shape.D);
  });
}

// A logit is |scale| q . k + bias, with q negated for a negative scale, so that without a bias the largest product
// wins. This factor turns differences of products (no bias) or of logits (bias) into exponents of 2. It is never 0:
// padding is -inf and must stay so.
float score_factor(float scale, const float* bias) {
  return bias ? kLog2e : std::fmax(std::fabs(scale) * kLog2e, 1e-30f);
}
void orient(float* query, int64_t n, float scale) {
  if (scale < 0)
    for (int64_t i = 0; i < n; ++i) query[i] = -query[i];
}

// key_bias of sample b for keys [begin, end), -inf up to the end of the vector.
void load_bias(float* to, const Tensor& bias, int64_t b, int64_t begin, int64_t end) {
  with_type(bias.dtype, [&](auto type) {
    const auto* p = reinterpret_cast<const decltype(type)*>(bias.data) + b * bias.stride[0];
    for (int64_t j = begin; j < end; ++j) to[j] = to_float(p[j * bias.stride[1]]);
  });
  for (int64_t j = end; j < round_up(end, VL); ++j) to[j] = -kInfinity;
}

// Takes the columns beyond `cols` of a row of scores out of its last vector; a bias does so by itself.
void hide_tail(float* scores, int64_t cols, const float* bias) {
  for (int64_t j = cols; !bias && j < round_up(cols, VL); ++j) scores[j] = -kInfinity;
}

// scores[rows, cols rounded up to whole panels] = left [rows, D] times the panels from key `begin` on.
void score_block(float* scores, int64_t ld_scores, const Shape& shape, const float* left, int64_t rows,
                 const float* panels, int64_t begin, int64_t cols) {
  for (int64_t j = 0; j < cols; j += kPanel) {
    const float* panel = panels + (begin + j) / kPanel * shape.panel_floats();
    gemm<Floats, false>(rows, kPanel / VL, shape.D < kChain ? shape.D : kChain, {left, shape.ld, 1}, panel, kPanel, scores + j,
                ld_scores);
    for (int64_t d = kChain; d < shape.D; d += kChain)
      gemm<Floats, true>(rows, kPanel / VL, shape.D - d < kChain ? shape.D - d : kChain, {left + d, shape.ld, 1},
                 panel + d * kPanel, kPanel, scores + j, ld_scores);
  }
}

// Enough (batch, key head) pairs to keep all threads busy with whole pairs? `percent`: the least worthwhile share.
bool whole_pairs(int64_t pairs, int64_t percent) {
  const int64_t threads = omp_get_max_threads();
  return pairs * 100 >= ceil_div(pairs, threads) * threads * percent;
}

}  // namespace
}  // namespace DIFUSE_ISA
}  // namespace difuse
