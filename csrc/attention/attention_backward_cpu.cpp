// attention backward on the CPU. With P = 2^(logit - largest) / total recomputed block by block:
//
//   dV = P^T dout   dP = dout V^T   dS = P (dP - sum_j P dP)   dQ = scale dS K   dK = scale dS^T Q   dbias = sum_i dS
//
// P and dP of a block of queries are kept for all its keys, so that the row sum is taken of the numbers it is
// subtracted from: dout . out, equal on paper, would leave the rounding of both sides in dS.
// A task is one (sample, key head) with all its queries, heads and blocks in order. Where there are fewer of those than
// threads, dQ and the row sums are computed by query block, then dK and dV by key block, each recomputing P; the sums
// run in the same order, so the bits do not depend on the thread count.
#include "blocks.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

struct Backward {
  const Shape shape;
  const Tensor &dout, &q, &k, &v, &kv_lengths, &key_bias, &stats, &dq, &dk, &dv, &dbias;
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
  int64_t score_row(int64_t keys) const { return round_up(keys, kKeys) + 16; }
  int64_t work_floats(int64_t keys) const {
    return round_up(3 * kRows * shape.ld + 2 * kRows * score_row(keys) + kRows, 16);
  }
  int64_t visible(int64_t pair) const { return visible_keys(kv_lengths, pair / shape.Hkv, shape.Sk); }

  // Keys [begin, end) of a pair, begin on a panel's edge.
  void pack(const Packed& to, int64_t pair, int64_t begin, int64_t end) const {
    const int64_t b = pair / shape.Hkv, h = pair % shape.Hkv, n = visible(pair);
    if (end > n) end = n;
    if (begin >= end) return;
    for (int64_t j = begin; j < end; j += kPanel) {
      pack_panel(to.k_panels + j / kPanel * shape.panel_floats(), shape, k, b, j, end, h);
      pack_panel(to.v_panels + j / kPanel * shape.panel_floats(), shape, v, b, j, end, h);
    }
    load_rows(to.k_rows + begin * shape.ld, shape, k, b, begin, h, end - begin);
    if (key_bias) load_bias(to.bias, key_bias, b, begin, end);
  }

  // One block of queries of head h against keys [j_begin, j_end). Adds to `to` (key j_begin is its row 0) if given.
  // `whole`: these are all visible keys; then the row sums are written to `row_sums`, and dQ is written. Otherwise the
  // row sums are read.
  void queries(const Packed& from, int64_t b, int64_t h, int64_t begin, int64_t j_begin, int64_t j_end, const Sums* to,
               bool whole, float* row_sums, float* work) const {
    const int64_t rows = shape.Sq - begin < kRows ? shape.Sq - begin : kRows, vectors = shape.width / VL;
    const int64_t ld = shape.ld, ld_scores = score_row(j_end - j_begin);
    float *query = work, *grad = query + kRows * ld, *query_grad = grad + kRows * ld;
    float *weights = query_grad + kRows * ld, *logit_grads = weights + kRows * ld_scores;
    const float* row_stats = at<float>(stats, b, h) + 2 * begin;
    row_sums += (b * shape.H + h) * shape.Sq + begin;
    load_rows(query, shape, q, b, begin, h, rows);
    load_rows(grad, shape, dout, b, begin, h, rows);
    orient(query, rows * ld, scale);
    if (whole) std::memset(row_sums, 0, rows * 4);
    for (int64_t j = j_begin; j < j_end; j += kKeys) {
      const int64_t cols = j_end - j < kKeys ? j_end - j : kKeys, at = j - j_begin;
      score_block(weights + at, ld_scores, shape, query, rows, from.k_panels, j, cols);
      score_block(logit_grads + at, ld_scores, shape, grad, rows, from.v_panels, j, cols);
      for (int64_t i = 0; i < rows; ++i) {
        const float sum = weigh_row(weights + i * ld_scores + at, logit_grads + i * ld_scores + at, cols,
                                    key_bias ? from.bias + j : nullptr, row_stats[2 * i], row_stats[2 * i + 1]);
        if (whole) row_sums[i] += sum;
      }
    }
    std::memset(query_grad, 0, rows * ld * 4);
    for (int64_t j = j_begin; j < j_end; j += kKeys) {
      const int64_t cols = j_end - j < kKeys ? j_end - j : kKeys, at = j - j_begin;
      const float* p = weights + at;
      float* ds = logit_grads + at;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = i * ld_scores; c < i * ld_scores + cols; c += VL)
          store(ds + c, load(p + c) * (load(ds + c) - row_sums[i]));
      if (to) {
        if (dv) gemm<Floats, true>(cols, vectors, rows, {p, 1, ld_scores}, grad, ld, to->dv + at * ld, ld);
        if (dk) gemm<Floats, true>(cols, vectors, rows, {ds, 1, ld_scores}, query, ld, to->dk + at * ld, ld);
        if (dbias) add_columns(to->dbias + at, ds, ld_scores, rows, cols);
      }
      if (whole && dq) gemm<Floats, true>(rows, vectors, cols, {ds, ld_scores, 1}, from.k_rows + j * ld, ld, query_grad, ld);
    }
    if (!whole || !dq) return;
    for (int64_t i = 0; i < rows; ++i) store_scaled(dq, b, begin + i, h, query_grad + i * ld, scale);
  }

  // Scores become P; returns the sum of P dP.
  float weigh_row(float* s, float* dp, int64_t cols, const float* bias, float largest, float inverse) const {
    const float factor = score_factor(scale, bias);
    hide_tail(s, cols, bias);
    vf sum = {};
    for (int64_t j = 0; j < cols; j += VL) {
      vf score = load(s + j);
      if (bias) score = score * std::fabs(scale) + load(bias + j);
      const vf weight = exp2((score - largest) * factor) * inverse;
      store(s + j, weight);
      sum += weight * load(dp + j);
    }
    return hsum(sum);
  }

  static void add_columns(float* to, const float* from, int64_t ld, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; ++i, from += ld)
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
      if (dk) store_scaled(dk, b, j, h, from.dk + (j - begin) * shape.ld, std::fabs(scale));
      if (dv) store_scaled(dv, b, j, h, from.dv + (j - begin) * shape.ld, 1.f);
    }
    if (dbias) std::memcpy(heads_bias + pair * shape.Sk + begin, from.dbias, (end - begin) * 4);
  }

  void run() const {
    const int64_t group = shape.group(), blocks = ceil_div(shape.Sq, kRows), pairs = shape.pairs(), Sk = shape.Sk;
    const double flops = 10. * shape.B * shape.H * shape.Sq * shape.Sk * shape.D;
    const Scratch heads_bias(dbias ? pairs * Sk : 0), row_sums(shape.B * shape.H * shape.Sq);
    if (whole_pairs(pairs, 72)) {  // below that the 7/5 of the work is done sooner
      const int64_t sums_at = packed_floats(), work_at = sums_at + sums_floats(Sk);
      each_task(pairs, flops, work_at + work_floats(Sk), [&](int64_t pair, float* scratch) {
        const Packed keys = packed(scratch);
        const Sums total = sums(scratch + sums_at, Sk);
        float* work = scratch + work_at;
        std::memset(scratch + sums_at, 0, sums_floats(Sk) * 4);
        pack(keys, pair, 0, Sk);
        for (int64_t i = 0; i < group * blocks; ++i)
          queries(keys, pair / shape.Hkv, pair % shape.Hkv * group + i / blocks, i % blocks * kRows, 0, visible(pair),
                  &total, true, row_sums.data, work);
        finish(total, pair, 0, Sk, heads_bias.data);
      });
    } else {
      const Scratch all(pairs * packed_floats());
      const auto keys_of = [&](int64_t pair) { return packed(all.data + pair * packed_floats()); };
      const int64_t key_blocks = ceil_div(Sk, kKeys);
      each_task(pairs * key_blocks, flops, work_floats(0), [&](int64_t i, float* work) {
        pack(keys_of(i / key_blocks), i / key_blocks, i % key_blocks * kKeys, i % key_blocks * kKeys + kKeys);
      });
      each_task(shape.B * shape.H * blocks, flops, work_floats(Sk), [&](int64_t i, float* work) {
        const int64_t b = i / blocks / shape.H, h = i / blocks % shape.H, pair = b * shape.Hkv + h / group;
        queries(keys_of(pair), b, h, i % blocks * kRows, 0, visible(pair), nullptr, true, row_sums.data, work);
      });
      if (dk || dv || dbias)
        each_task(pairs * key_blocks, flops, sums_floats(kKeys) + work_floats(kKeys), [&](int64_t i, float* scratch) {
          const int64_t pair = i / key_blocks, begin = i % key_blocks * kKeys, n = visible(pair);
          const int64_t end = begin + kKeys < Sk ? begin + kKeys : Sk, seen = end < n ? end : n;
          const Sums total = sums(scratch, kKeys);
          std::memset(scratch, 0, sums_floats(kKeys) * 4);
          for (int64_t g = 0; g < group * blocks && begin < seen; ++g)
            queries(keys_of(pair), pair / shape.Hkv, pair % shape.Hkv * group + g / blocks, g % blocks * kRows, begin,
                    seen, &total, false, row_sums.data, scratch + sums_floats(kKeys));
          finish(total, pair, begin, end, heads_bias.data);
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
                        const Tensor& key_bias, float scale, const Tensor& stats, const Tensor& dq, const Tensor& dk,
                        const Tensor& dv, const Tensor& dbias) {
  Backward{{q, k}, dout, q, k, v, kv_lengths, key_bias, stats, dq, dk, dv, dbias, scale}.run();
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
