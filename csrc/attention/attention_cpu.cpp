// attention forward on the CPU, contract in kernels/difuse_kernels/attention/attention.py. Dao et al. 2022.
//
// Per (sample, key head): K is packed into panels [Sk/kPanel][D][kPanel], V into float32 rows. Per block of kRows
// queries an online softmax walks over blocks of kKeys keys; scores, weights and the partial output stay in the caches.
// Where the CPU multiplies bfloat16, such operands stay so: K in panels [Sk/kPanel][D/2][kPanel] of pairs along D, V in
// rows of pairs along the keys, the weights rounded; scores, softmax and sums are float32 as ever.
// exp(x) is 2^(x log2 e). A query's result depends on its own row only and is summed over keys in order, so thread
// count and batch mates leave its bits alone.
#include "blocks.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kScoreRow = kKeys + 16;
constexpr float kLowest = -__FLT_MAX__;  // no finite logit is below, and finite: 2^(-inf - kLowest) is 0, not nan

#if defined(DIFUSE_BF16_DOTS)
// Rows of one head as they are, in pairs of bfloat16.
void copy_rows(int32_t* to, const Shape& shape, const Tensor& t, int64_t b, int64_t s, int64_t h, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * shape.ld, head_row(t, b, s + i, h), shape.D * 2);
}
void flip_signs(int32_t* pairs, int64_t n) {
  for (int64_t i = 0; i < n; ++i) pairs[i] ^= int32_t(0x80008000);
}

// Rows [begin, end) of one head, begin even, in pairs: (row 0, row 1), (row 2, row 3), ...; a last one with zeros.
void pair_rows(int32_t* to, const Shape& shape, const Tensor& t, int64_t b, int64_t begin, int64_t end, int64_t h) {
  for (int64_t s = begin; s < end; s += 2, to += shape.ld) {
    const bf16* first = reinterpret_cast<const bf16*>(head_row(t, b, s, h));
    const bf16* second = s + 1 < end ? reinterpret_cast<const bf16*>(head_row(t, b, s + 1, h)) : nullptr;
    each_vector(shape.D, [&](int64_t i, int n) {
      const vu low = (vu)get(first + i, n) >> 16, high = second ? (vu)get(second + i, n) : vu{};
      store(to + i, (vi)(low | high));
    });
  }
}
#endif

// dots: q, k and v are bfloat16 and are multiplied as such.
template <bool dots> struct Forward {
  using Kind = std::conditional_t<dots, Pairs, Floats>;
  using E = typename Kind::E;

  const Shape shape;
  const Tensor &q, &k, &v, &kv_lengths, &key_bias, &out, &stats;
  float scale;

  struct Packed { E *k, *v; float* bias; };
  int64_t panel() const { return dots ? shape.D / 2 * kPanel : shape.panel_floats(); }
  int64_t k_size() const { return ceil_div(shape.Sk, kPanel) * panel(); }
  int64_t v_size() const { return ceil_div(shape.Sk, Kind::N) * shape.ld; }
  int64_t packed_floats() const { return round_up(k_size() + v_size() + shape.bias_floats(), 16); }
  Packed packed(float* base) const {
    E* k = reinterpret_cast<E*>(base);
    return {k, k + k_size(), base + k_size() + v_size()};
  }
  int64_t work_floats() const { return 2 * kRows * shape.ld + kRows * kScoreRow + 2 * kRows; }
  int64_t query_blocks() const { return ceil_div(shape.Sq, kRows); }

  // Keys [begin, end) of a pair, begin on a panel's edge.
  void pack(const Packed& to, int64_t pair, int64_t begin, int64_t end) const {
    const int64_t b = pair / shape.Hkv, h = pair % shape.Hkv, n = visible_keys(kv_lengths, b, shape.Sk);
    if (end > n) end = n;
    if (begin >= end) return;
    for (int64_t j = begin; j < end; j += kPanel) {
      E* to_panel = to.k + j / kPanel * panel();
      if constexpr (dots) pack_panel<int32_t>(to_panel, shape, k, b, j, end, h, shape.D / 2);
      else pack_panel(to_panel, shape, k, b, j, end, h);
    }
    if constexpr (dots) pair_rows(to.v + begin / 2 * shape.ld, shape, v, b, begin, end, h);
    else load_rows(to.v + begin * shape.ld, shape, v, b, begin, h, end - begin);
    if (key_bias) load_bias(to.bias, key_bias, b, begin, end);
  }

  // The largest logit of a row of scores. With a bias scores become logits first; without, they stay bare.
  float largest_of_row(float* s, int64_t cols, const float* bias) const {
    hide_tail(s, cols, bias);
    vf best = splat(-kInfinity);
    for (int64_t j = 0; j < cols; j += VL) {
      vf score = load(s + j);
      if (bias) store(s + j, score = score * std::fabs(scale) + load(bias + j));
      best = vmax(best, score);
    }
    return hmax(best);
  }

  // Turns a row of logits into weights 2^(logit - largest), whose sum is returned. Differences are scaled, not what is
  // subtracted: the largest gets exactly 1 however large it is. With dots, weights become bfloat16 at the row's start.
  float weights_of_row(float* s, int64_t cols, float largest, float factor) const {
    vf sum = {};
    for (int64_t j = 0; j < cols; j += VL) {
      const vf weight = exp2((load(s + j) - largest) * factor);
      if constexpr (dots) store(reinterpret_cast<bf16*>(s) + j, weight);  // behind what is still to be read
      else store(s + j, weight);
      sum += weight;
    }
    return hsum(sum);
  }

  // Scores of a block of keys become weights; the rows of `o` and `total` so far are brought to the new `largest`.
  // A pass for the maxima and one for the weights: rows do not wait for each other's reductions.
  void softmax(float* scores, int64_t rows, int64_t cols, const float* bias, float* largest, float* total,
               float* o) const {
    const float factor = score_factor(scale, bias);
    for (int64_t i = 0; i < rows; ++i) {
      const float best = largest_of_row(scores + i * kScoreRow, cols, bias);
      if (best <= largest[i]) continue;
      if (total[i] != 0) {
        const float shrink = exp2(splat((largest[i] - best) * factor))[0];
        total[i] *= shrink;
        float* row = o + i * shape.ld;
        for (int64_t d = 0; d < shape.width; d += VL) store(row + d, load(row + d) * shrink);
      }
      largest[i] = best;
    }
    for (int64_t i = 0; i < rows; ++i) total[i] += weights_of_row(scores + i * kScoreRow, cols, largest[i], factor);
  }

  // As score_block, of pairs.
  void score_pairs(float* scores, const E* query, int64_t rows, const E* panels, int64_t begin, int64_t cols) const {
    for (int64_t j = 0; j < cols; j += kPanel)
      gemm<Kind, false>(rows, kPanel / VL, shape.D / 2, {query, shape.ld, 1}, panels + (begin + j) / kPanel * panel(), kPanel,
                  scores + j, kScoreRow);
  }

  // Asks for rows of another pair: of its `number`-th query head's and, once, of its keys.
  void fetch(int64_t pair, int64_t number, int64_t begin, int64_t rows) const {
    const int64_t b = pair / shape.Hkv, h = pair % shape.Hkv;
    prefetch_rows<false, false>(shape, q, b, begin, h * shape.group() + number, rows);
    if (number) return;
    prefetch_rows<false, false>(shape, k, b, begin, h, rows);
    prefetch_rows<false, false>(shape, v, b, begin, h, rows);
  }

  // One block of queries of head h against all keys of its pair. next: the pair that this thread will probably read
  // after this one, or -1.
  void queries(const Packed& from, int64_t b, int64_t h, int64_t begin, int64_t next, float* work) const {
    const int64_t n = visible_keys(kv_lengths, b, shape.Sk);
    const int64_t rows = shape.Sq - begin < kRows ? shape.Sq - begin : kRows;
    float *o = work + kRows * shape.ld, *scores = o + kRows * shape.ld;
    E *query = reinterpret_cast<E*>(work), *weights = reinterpret_cast<E*>(scores);
    float *largest = scores + kRows * kScoreRow, *total = largest + kRows;
    if constexpr (dots) {
      copy_rows(query, shape, q, b, begin, h, rows);
      if (scale < 0) flip_signs(query, rows * shape.ld);
    } else {
      load_rows(query, shape, q, b, begin, h, rows);
      orient(query, rows * shape.ld, scale);
    }
    std::memset(o, 0, kRows * shape.ld * 4);
    for (int64_t i = 0; i < rows; ++i) largest[i] = kLowest, total[i] = 0;
    for (int64_t j = 0; j < n; j += kKeys) {
      const int64_t cols = n - j < kKeys ? n - j : kKeys;
      if constexpr (dots) score_pairs(scores, query, rows, from.k, j, cols);
      else score_block(scores, kScoreRow, shape, query, rows, from.k, j, cols);
      if (j == 0 && next >= 0) fetch(next, h % shape.group(), begin, rows);
      softmax(scores, rows, cols, key_bias ? from.bias + j : nullptr, largest, total, o);
      gemm<Kind, true>(rows, shape.width / VL, ceil_div(cols, Kind::N), {weights, kScoreRow, 1}, from.v + j / Kind::N * shape.ld,
                 shape.ld, o, shape.ld);
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
        pack(keys, pair, 0, shape.Sk);
        const int64_t next = pair + omp_get_num_threads();
        for (int64_t i = 0; i < group * blocks; ++i)
          queries(keys, pair / shape.Hkv, pair % shape.Hkv * group + i / blocks, i % blocks * kRows,
                  next < pairs ? next : -1, work);
      });
      return;
    }
    const Scratch all(pairs * packed_floats());
    const int64_t key_blocks = ceil_div(shape.Sk, kKeys);
    each_task(pairs * key_blocks, flops, work_floats(), [&](int64_t i, float* work) {
      const int64_t pair = i / key_blocks, begin = i % key_blocks * kKeys;
      pack(packed(all.data + pair * packed_floats()), pair, begin, begin + kKeys);
    });
    each_task(shape.B * shape.H * blocks, flops, work_floats(), [&](int64_t i, float* work) {
      const int64_t b = i / blocks / shape.H, h = i / blocks % shape.H;
      queries(packed(all.data + (b * shape.Hkv + h / group) * packed_floats()), b, h, i % blocks * kRows, -1, work);
    });
  }
};

}  // namespace

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_lengths,
                       const Tensor& key_bias, float scale, const Tensor& out, const Tensor& stats) {
#if defined(DIFUSE_BF16_DOTS)  // not for training: the backward pass recomputes the scores in float32
  if (!stats && q.dtype == DType::bf16 && k.dtype == DType::bf16 && v.dtype == DType::bf16)
    return Forward<true>{{q, k}, q, k, v, kv_lengths, key_bias, out, stats, scale}.run();
#endif
  Forward<false>{{q, k}, q, k, v, kv_lengths, key_bias, out, stats, scale}.run();
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
