// attention forward on the CPU, contract in kernels/difuse_kernels/attention/attention.py. Dao et al. 2022.
//
// Per (sample, key head): K is packed into panels [Sk/kPanel][D][kPanel], V into float32 rows. Per block of kRows
// queries an online softmax walks over blocks of kKeys keys; scores, weights and the partial output stay in the caches.
// exp(x) is 2^(x log2 e). A query's result depends on its own row only and is summed over keys in order, so thread
// count and batch mates leave its bits alone.
#include "blocks.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kScoreRow = kKeys + 16;
constexpr float kLowest = -__FLT_MAX__;  // no finite logit is below, and finite: 2^(-inf - kLowest) is 0, not nan

struct Forward {
  const Shape shape;
  const Tensor &q, &k, &v, &kv_lengths, &key_bias, &out, &stats;
  float scale;

  struct Packed { float *k, *v, *bias; };
  int64_t packed_floats() const {
    return round_up(shape.transposed_floats() + shape.row_floats() + shape.bias_floats(), 16);
  }
  Packed packed(float* base) const {
    return {base, base + shape.transposed_floats(), base + shape.transposed_floats() + shape.row_floats()};
  }
  int64_t work_floats() const { return (2 * kRows + kPanel) * shape.ld + kRows * kScoreRow + 2 * kRows; }
  int64_t query_blocks() const { return ceil_div(shape.Sq, kRows); }

  // Keys [begin, end) of a pair, begin on a panel's edge.
  void pack(const Packed& to, int64_t pair, int64_t begin, int64_t end, float* work) const {
    const int64_t b = pair / shape.Hkv, h = pair % shape.Hkv, n = visible_keys(kv_lengths, b, shape.Sk);
    if (end > n) end = n;
    if (begin >= end) return;
    for (int64_t j = begin; j < end; j += kPanel)
      pack_panel(to.k + j / kPanel * shape.panel_floats(), work, shape, k, b, j, end, h);
    load_rows(to.v + begin * shape.ld, shape, v, b, begin, h, end - begin);
    if (key_bias) load_bias(to.bias, key_bias, b, begin, end);
  }

  // Turns a row of scores into weights 2^(logit - largest so far), and brings `largest`, `total` and `o` up to date.
  // With a bias scores become logits first; without, they and `largest` stay bare. Differences are scaled, not what is
  // subtracted: the largest gets exactly 1 however large it is.
  void softmax_row(float* s, int64_t cols, const float* bias, float& largest, float& total, float* o) const {
    const float factor = score_factor(scale, bias);
    const int64_t padded = round_up(cols, VL);
    hide_tail(s, cols, bias);
    vf best = splat(-kInfinity);
    for (int64_t j = 0; j < padded; j += VL) {
      vf score = load(s + j);
      if (bias) store(s + j, score = score * std::fabs(scale) + load(bias + j));
      best = vmax(best, score);
    }
    const float block_best = hmax(best);
    if (block_best > largest) {
      if (total != 0) {
        const float shrink = exp2(splat((largest - block_best) * factor))[0];
        total *= shrink;
        for (int64_t d = 0; d < shape.width; d += VL) store(o + d, load(o + d) * shrink);
      }
      largest = block_best;
    }
    vf sum = {};
    for (int64_t j = 0; j < padded; j += VL) {
      const vf weight = exp2((load(s + j) - largest) * factor);
      store(s + j, weight);
      sum += weight;
    }
    total += hsum(sum);
  }

  // One block of queries of head h against all keys of its pair.
  void queries(const Packed& from, int64_t b, int64_t h, int64_t begin, float* work) const {
    const int64_t n = visible_keys(kv_lengths, b, shape.Sk);
    const int64_t rows = shape.Sq - begin < kRows ? shape.Sq - begin : kRows;
    float *query = work, *o = query + kRows * shape.ld, *scores = o + kRows * shape.ld;
    float *largest = scores + kRows * kScoreRow, *total = largest + kRows;
    load_rows(query, shape, q, b, begin, h, rows);
    orient(query, rows * shape.ld, scale);
    std::memset(o, 0, kRows * shape.ld * 4);
    for (int64_t i = 0; i < rows; ++i) largest[i] = kLowest, total[i] = 0;
    for (int64_t j = 0; j < n; j += kKeys) {
      const int64_t cols = n - j < kKeys ? n - j : kKeys;
      score_block(scores, kScoreRow, shape, query, rows, from.k, j, cols);
      for (int64_t i = 0; i < rows; ++i)
        softmax_row(scores + i * kScoreRow, cols, key_bias ? from.bias + j : nullptr, largest[i], total[i],
                    o + i * shape.ld);
      gemm<true>(rows, shape.width / VL, cols, {scores, kScoreRow, 1}, from.v + j * shape.ld, shape.ld, o, shape.ld);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float inverse = total[i] == 0 ? 0.f : 1.f / total[i];
      float* row = o + i * shape.ld;
      for (int64_t d = 0; d < shape.width; d += VL) store(row + d, load(row + d) * inverse);
      store_row(head_row(out, b, begin + i, h), row, out.dtype, shape.D);
      if (!stats) continue;
      float* row_stats = at<float>(stats, b, h) + 2 * (begin + i);
      row_stats[0] = largest[i], row_stats[1] = inverse;
    }
  }

  void run() const {
    const int64_t group = shape.group(), blocks = query_blocks(), pairs = shape.pairs();
    const double flops = 4. * shape.B * shape.H * shape.Sq * shape.Sk * shape.D;
    if (whole_pairs(pairs, 80)) {
      each_task(pairs, flops, packed_floats() + work_floats(), [&](int64_t pair, float* scratch) {
        const Packed keys = packed(scratch);
        float* work = scratch + packed_floats();
        pack(keys, pair, 0, shape.Sk, work);
        for (int64_t i = 0; i < group * blocks; ++i)
          queries(keys, pair / shape.Hkv, pair % shape.Hkv * group + i / blocks, i % blocks * kRows, work);
      });
      return;
    }
    const Scratch all(pairs * packed_floats());
    const int64_t key_blocks = ceil_div(shape.Sk, kKeys);
    each_task(pairs * key_blocks, flops, work_floats(), [&](int64_t i, float* work) {
      const int64_t pair = i / key_blocks, begin = i % key_blocks * kKeys;
      pack(packed(all.data + pair * packed_floats()), pair, begin, begin + kKeys, work);
    });
    each_task(shape.B * shape.H * blocks, flops, work_floats(), [&](int64_t i, float* work) {
      const int64_t b = i / blocks / shape.H, h = i / blocks % shape.H;
      queries(packed(all.data + (b * shape.Hkv + h / group) * packed_floats()), b, h, i % blocks * kRows, work);
    });
  }
};

}  // namespace

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_lengths,
                       const Tensor& key_bias, float scale, const Tensor& out, const Tensor& stats) {
  Forward{{q, k}, q, k, v, kv_lengths, key_bias, out, stats, scale}.run();
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
