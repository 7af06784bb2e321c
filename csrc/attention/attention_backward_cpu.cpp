// attention backward on the CPU. With P = 2^(logit - lse) recomputed block by block and delta_i = dout_i . out_i:
//
//   dV = P^T dout     dP = dout V^T     dS = P (dP - delta)     dQ = scale dS K     dK = scale dS^T Q     dbias = sum_i dS
//
// A task is one (sample, key head) with all its queries, heads and blocks in order. Where there are fewer of those than
// threads, dK and dV are computed by key block and dQ by query block, each recomputing P; the sums run in the same order,
// so the bits do not depend on the thread count.
#include "blocks.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kRows = 48;
constexpr int64_t kKeys = 128;
constexpr int64_t kScoreRow = kKeys + 16;

struct Backward {
  const Shape shape;
  const Tensor &dout, &q, &k, &v, &kv_lengths, &key_bias, &out, &lse, &dq, &dk, &dv, &dbias;
  float scale;

  struct Packed { float *k_panels, *v_panels, *k_rows, *bias; };
  int64_t packed_floats() const {
    return round_up(2 * shape.transposed_floats() + shape.row_floats() + shape.bias_floats(), 16);
  }
  Packed packed(float* base) const {
    float* v_panels = base + shape.transposed_floats();
    float* k_rows = v_panels + shape.transposed_floats();
    return {base, v_panels, k_rows, k_rows + shape.row_floats()};
  }
  // Gradients of the keys from some key on, as float32; dbias may be absent. `keys` of them.
  struct Sums { float *dk, *dv, *dbias; };
  int64_t sums_floats(int64_t keys) const { return round_up(2 * keys * shape.ld + round_up(keys, kPanel), 16); }
  Sums sums(float* base, int64_t keys) const {
    return {base, base + keys * shape.ld, base + 2 * keys * shape.ld};
  }
  int64_t work_floats() const {
    return round_up((3 * kRows + kPanel) * shape.ld + 2 * kRows * kScoreRow + kRows, 16);
  }
  int64_t visible(int64_t pair) const { return visible_keys(kv_lengths, pair / shape.Hkv, shape.Sk); }

  // Keys [begin, end) of a pair, begin on a panel's edge.
  void pack(const Packed& to, int64_t pair, int64_t begin, int64_t end, float* work) const {
    const int64_t b = pair / shape.Hkv, h = pair % shape.Hkv, n = visible(pair);
    if (end > n) end = n;
    if (begin >= end) return;
    for (int64_t j = begin; j < end; j += kPanel) {
      pack_panel(to.k_panels + j / kPanel * shape.panel_floats(), work, shape, k, b, j, end, h);
      pack_panel(to.v_panels + j / kPanel * shape.panel_floats(), work, shape, v, b, j, end, h);
    }
    load_rows(to.k_rows + begin * shape.ld, shape, k, b, begin, h, end - begin);
    if (key_bias) load_bias(to.bias, key_bias, b, begin, end);
  }

  // One block of queries of head h against keys [j_begin, j_end). Adds to `to` (key j_begin is its row 0) if given,
  // writes dQ if `whole`, for which the keys must be all that are visible.
  void queries(const Packed& from, int64_t b, int64_t h, int64_t begin, int64_t j_begin, int64_t j_end, const Sums* to,
               bool whole, float* work) const {
    const int64_t rows = shape.Sq - begin < kRows ? shape.Sq - begin : kRows, vectors = shape.width / VL;
    float *query = work, *grad = query + kRows * shape.ld, *query_grad = grad + kRows * shape.ld;
    float *weights = query_grad + kRows * shape.ld, *logit_grads = weights + kRows * kScoreRow;
    float* delta = logit_grads + kRows * kScoreRow;
    const float* row_lse = reinterpret_cast<const float*>(lse.data) + (b * shape.H + h) * shape.Sq + begin;
    load_rows(query, shape, q, b, begin, h, rows);
    load_rows(grad, shape, dout, b, begin, h, rows);
    load_rows(query_grad, shape, out, b, begin, h, rows);
    for (int64_t i = 0; i < rows; ++i) {
      vf dot = {};
      for (int64_t d = i * shape.ld; d < i * shape.ld + shape.width; d += VL) dot += load(grad + d) * load(query_grad + d);
      delta[i] = hsum(dot);
    }
    std::memset(query_grad, 0, rows * shape.ld * 4);
    for (int64_t j = j_begin; j < j_end; j += kKeys) {
      const int64_t cols = j_end - j < kKeys ? j_end - j : kKeys;
      score_block(weights, kScoreRow, shape, query, rows, from.k_panels, j, cols);
      score_block(logit_grads, kScoreRow, shape, grad, rows, from.v_panels, j, cols);
      for (int64_t i = 0; i < rows; ++i)
        softmax_row(weights + i * kScoreRow, logit_grads + i * kScoreRow, cols, key_bias ? from.bias + j : nullptr,
                    row_lse[i], delta[i]);
      if (to) {
        const int64_t offset = (j - j_begin) * shape.ld;
        if (dv) gemm<true>(cols, vectors, rows, {weights, 1, kScoreRow}, grad, shape.ld, to->dv + offset, shape.ld);
        if (dk) gemm<true>(cols, vectors, rows, {logit_grads, 1, kScoreRow}, query, shape.ld, to->dk + offset, shape.ld);
        if (dbias) add_columns(to->dbias + j - j_begin, logit_grads, rows, cols);
      }
      if (whole && dq)
        gemm<true>(rows, vectors, cols, {logit_grads, kScoreRow, 1}, from.k_rows + j * shape.ld, shape.ld, query_grad,
                   shape.ld);
    }
    if (!whole || !dq) return;
    for (int64_t i = 0; i < rows; ++i) store_scaled(dq, b, begin + i, h, query_grad + i * shape.ld, scale);
  }

  // Scores become P, dP becomes dS. Columns beyond `cols` hold anything.
  void softmax_row(float* s, float* dp, int64_t cols, const float* bias, float row_lse, float delta) const {
    const float c = scale * kLog2e;
    for (int64_t j = 0; j < cols; j += VL) {
      const vf logit = load(s + j) * c;
      const vf weight = exp2((bias ? logit + load(bias + j) : logit) - row_lse);
      store(s + j, weight);
      store(dp + j, weight * (load(dp + j) - delta));
    }
  }

  static void add_columns(float* to, const float* from, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; ++i, from += kScoreRow)
      for (int64_t j = 0; j < cols; ++j) to[j] += from[j];
  }

  void store_scaled(const Tensor& to, int64_t b, int64_t s, int64_t h, float* row, float factor) const {
    for (int64_t d = 0; d < shape.width; d += VL) store(row + d, load(row + d) * factor);
    store_row(head_row(to, b, s, h), row, to.dtype, shape.D);
  }

  // The finished gradients of keys [begin, end); `heads_bias` [pairs, Sk] gets the pair's share of dbias.
  void finish(const Sums& from, int64_t pair, int64_t begin, int64_t end, float* heads_bias) const {
    const int64_t b = pair / shape.Hkv, h = pair % shape.Hkv;
    for (int64_t j = begin; j < end; ++j) {
      if (dk) store_scaled(dk, b, j, h, from.dk + (j - begin) * shape.ld, scale);
      if (dv) store_scaled(dv, b, j, h, from.dv + (j - begin) * shape.ld, 1.f);
    }
    if (dbias) std::memcpy(heads_bias + pair * shape.Sk + begin, from.dbias, (end - begin) * 4);
  }

  void run() const {
    const int64_t group = shape.group(), blocks = ceil_div(shape.Sq, kRows), pairs = shape.pairs(), Sk = shape.Sk;
    const double flops = 10. * shape.B * shape.H * shape.Sq * shape.Sk * shape.D;
    const Scratch heads_bias(dbias ? pairs * Sk : 0);
    if (whole_pairs(pairs, 72)) {  // below that the 7/5 of the work is done sooner
      const int64_t sums_at = packed_floats(), work_at = sums_at + sums_floats(Sk);
      each_task(pairs, flops, work_at + work_floats(), [&](int64_t pair, float* scratch) {
        const Packed keys = packed(scratch);
        const Sums total = sums(scratch + sums_at, Sk);
        float* work = scratch + work_at;
        std::memset(scratch + sums_at, 0, sums_floats(Sk) * 4);
        pack(keys, pair, 0, Sk, work);
        for (int64_t i = 0; i < group * blocks; ++i)
          queries(keys, pair / shape.Hkv, pair % shape.Hkv * group + i / blocks, i % blocks * kRows, 0, visible(pair),
                  &total, true, work);
        finish(total, pair, 0, Sk, heads_bias.data);
      });
    } else {
      const Scratch all(pairs * packed_floats());
      const auto keys_of = [&](int64_t pair) { return packed(all.data + pair * packed_floats()); };
      const int64_t key_blocks = ceil_div(Sk, kKeys);
      each_task(pairs * key_blocks, flops, work_floats(), [&](int64_t i, float* work) {
        pack(keys_of(i / key_blocks), i / key_blocks, i % key_blocks * kKeys, i % key_blocks * kKeys + kKeys, work);
      });
      if (dk || dv || dbias)
        each_task(pairs * key_blocks, flops, sums_floats(kKeys) + work_floats(), [&](int64_t i, float* scratch) {
          const int64_t pair = i / key_blocks, begin = i % key_blocks * kKeys, n = visible(pair);
          const int64_t end = begin + kKeys < Sk ? begin + kKeys : Sk, seen = end < n ? end : n;
          const Sums total = sums(scratch, kKeys);
          std::memset(scratch, 0, sums_floats(kKeys) * 4);
          for (int64_t g = 0; g < group * blocks && begin < seen; ++g)
            queries(keys_of(pair), pair / shape.Hkv, pair % shape.Hkv * group + g / blocks, g % blocks * kRows, begin,
                    seen, &total, false, scratch + sums_floats(kKeys));
          finish(total, pair, begin, end, heads_bias.data);
        });
      if (dq)
        each_task(shape.B * shape.H * blocks, flops, work_floats(), [&](int64_t i, float* work) {
          const int64_t b = i / blocks / shape.H, h = i / blocks % shape.H, pair = b * shape.Hkv + h / group;
          queries(keys_of(pair), b, h, i % blocks * kRows, 0, visible(pair), nullptr, true, work);
        });
    }
    if (dbias) reduce_heads(heads_bias.data);
  }

  void reduce_heads(float* heads_bias) const {
    for (int64_t b = 0; b < shape.B; ++b) {
      float* total = heads_bias + b * shape.Hkv * shape.Sk;
      for (int64_t h = 1; h < shape.Hkv; ++h)
        for (int64_t j = 0; j < shape.Sk; ++j) total[j] += total[h * shape.Sk + j];
      store_row(dbias.data + b * dbias.stride[0] * element_size(dbias.dtype), total, dbias.dtype, shape.Sk);
    }
  }
};

}  // namespace

void attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_lengths,
                        const Tensor& key_bias, float scale, const Tensor& out, const Tensor& lse, const Tensor& dq,
                        const Tensor& dk, const Tensor& dv, const Tensor& dbias) {
  Backward{{q, k}, dout, q, k, v, kv_lengths, key_bias, out, lse, dq, dk, dv, dbias, scale}.run();
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
