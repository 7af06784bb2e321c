// adaLN's backward on the CPU. With xhat = (x' - mean) * rstd, dn = dh * (1 + scale) and g = dn * w:
//
//   dx     = dx_new + rstd * (g - mean(g) - xhat * mean(g * xhat))       (RMSNorm: without mean(g))
//   dy     = dx * gate              dgate  = sum_s dx * y                dshift = sum_s dh
//   dscale = sum_s dh * (xhat * w + b)       dweight = sum_bs dn * xhat          dbias = sum_bs dn
//
// A table's gradient is that of its modulation, summed over the samples (and tokens) before it is rounded.
// Two modulations of one norm: g is the sum of theirs.
#include "adaln_cpu.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int kTogether = 4;  // rows whose contributions to a token sum are added in registers before touching memory

// One modulated result and its gradients.
struct Branch {
  const Tensor& dh;
  Modulation modulation;
  Rows dscale, dshift;
};

struct Backward {
  const Tensor &dx_new, &x, &y;
  Rows gate;
  Branch one, two;  // the second only where one norm is modulated twice
  const Tensor &mean, &rstd, &dx, &dy;
  Rows dgate;
  bool rms, tables;  // tables: their gradients are wanted
  int sums;          // 3, or 5 with what the second branch or tables beside rows per token need
  float* partial;    // [B, tasks, sums, D]: sums over the task's tokens, the first three of dh*xhat, dh, dx*y

  // R tokens from s on. residual: dx_new is there; normed: dh is; gated: y is; dual: the second branch is. c1, c2 are the
  // two row means of the norm's backward (c1 is 0 for RMSNorm). With per-token modulation the sums take 1 + scale along.
  template <class T, class Ty, bool residual, bool normed, bool gated, bool dual, int R>
  void rows(int64_t b, int64_t s, const float* mul, const float* mul2, const float* g, float* total, float* g_sum,
            const float* one_plus_scale) const {
    const int64_t D = x.size[2];
    float *a_sum = total, *b_sum = total + D, *a2_sum = total + 3 * D, *b2_sum = total + 4 * D;
    float m[R] = {}, r[R] = {}, c1[R] = {}, c2[R] = {};
    const T *xs[R] = {}, *dhs[R] = {}, *dhs2[R] = {}, *dxs_new[R] = {};
    const Ty* ys[R] = {};
    T* dxs[R] = {};
    Ty* dys[R] = {};
    for (int k = 0; k < R; ++k) {
      if (residual) dxs_new[k] = at<T>(dx_new, b, s + k);
      if (gated) ys[k] = at<Ty>(y, b, s + k), dys[k] = at<Ty>(dy, b, s + k);
      if (!normed) continue;
      xs[k] = at<T>(x, b, s + k), dhs[k] = at<T>(one.dh, b, s + k), dxs[k] = at<T>(dx, b, s + k);
      if (dual) dhs2[k] = at<T>(two.dh, b, s + k);
      m[k] = at<float>(mean, b)[s + k];
      r[k] = at<float>(rstd, b)[s + k];
      vf sum1 = {}, sum2 = {}, sum3 = {}, sum4 = {};
      const auto add = [&](vf& s1, vf& s2, int64_t i, int n) {
        vf grad = get(dhs[k] + i, n) * get(mul + i, n);
        if (dual) grad += get(dhs2[k] + i, n) * get(mul2 + i, n);
        s1 += grad, s2 += grad * (get(xs[k] + i, n) - m[k]);
      };
      int64_t i = 0;
      for (; i + 2 * VL <= D; i += 2 * VL) add(sum1, sum2, i, VL), add(sum3, sum4, i + VL, VL);
      for (; i + VL <= D; i += VL) add(sum1, sum2, i, VL);
      if (i < D) add(sum3, sum4, i, int(D - i));
      c1[k] = rms ? 0.f : hsum(sum1 + sum3) / float(D);
      c2[k] = hsum(sum2 + sum4) * r[k] / float(D);
    }
    each_vector(D, [&](int64_t i, int n) {
      const vf mul_i = normed ? get(mul + i, n) : vf{};
      const vf g_i = gated ? get(g + i, n) : vf{};
      vf a = {}, bb = {}, a2 = {}, bb2 = {}, gg = {};
      for (int k = 0; k < R; ++k) {
        vf grad = residual ? get(dxs_new[k] + i, n) : vf{};
        if (normed) {
          const vf dh_i = get(dhs[k] + i, n);
          const vf xhat = (get(xs[k] + i, n) - m[k]) * r[k];
          if (dual) {
            const vf dh2_i = get(dhs2[k] + i, n);
            grad += r[k] * (dh_i * mul_i + dh2_i * get(mul2 + i, n) - c1[k] - xhat * c2[k]);
            a2 += dh2_i * xhat, bb2 += dh2_i;
          } else {
            grad += r[k] * (dh_i * mul_i - c1[k] - xhat * c2[k]);
          }
          const vf weighted = R == 1 && one_plus_scale ? dh_i * get(one_plus_scale + i, n) : dh_i;
          a += weighted * xhat, bb += weighted;
          put(dxs[k] + i, grad, n);
        }
        if (gated) {
          put(dys[k] + i, grad * g_i, n);
          gg += grad * get(ys[k] + i, n);
        }
      }
      if (normed) put(a_sum + i, get(a_sum + i, n) + a, n), put(b_sum + i, get(b_sum + i, n) + bb, n);
      if (dual) put(a2_sum + i, get(a2_sum + i, n) + a2, n), put(b2_sum + i, get(b2_sum + i, n) + bb2, n);
      if (gated) put(g_sum + i, get(g_sum + i, n) + gg, n);
    });
  }

  static void add_row(float* to, const float* row, int64_t D) {
    for (int64_t i = 0; i < D; ++i) to[i] += row[i];
  }

  // Per-token modulation: its gradients are rows of their own, dscale = dh * n with n = xhat*w + b, dshift = dh; if
  // `table_sums` is given, dscale and dshift are added to its two rows.
  template <class T>
  void token_gradients(const Branch& branch, int64_t b, int64_t s, float* row, float* spare, float* table_sums) const {
    const int64_t D = x.size[2];
    const Modulation& modulation = branch.modulation;
    const T* dhs = at<T>(branch.dh, b, s);
    if (branch.dshift.per_token() || table_sums) {
      each_vector(D, [&](int64_t i, int n) { put(row + i, get(dhs + i, n), n); });
      if (branch.dshift.t) store_row(branch.dshift.row(b, s), row, branch.dshift.t.dtype, D);
      if (table_sums) add_row(table_sums + D, row, D);
    }
    if (!branch.dscale.per_token() && !table_sums) return;
    const float m = at<float>(mean, b)[s], r = at<float>(rstd, b)[s];
    const T* xs = at<T>(x, b, s);
    each_vector(D, [&](int64_t i, int n) { put(row + i, (get(xs + i, n) - m) * r, n); });
    if (modulation.weight.t) {
      load_row(spare, modulation.weight.t.data, modulation.weight.t.dtype, D);
      for (int64_t i = 0; i < D; ++i) row[i] *= spare[i];
    }
    if (modulation.bias.t) {
      load_row(spare, modulation.bias.t.data, modulation.bias.t.dtype, D);
      for (int64_t i = 0; i < D; ++i) row[i] += spare[i];
    }
    each_vector(D, [&](int64_t i, int n) { put(row + i, get(row + i, n) * get(dhs + i, n), n); });
    if (branch.dscale.t) store_row(branch.dscale.row(b, s), row, branch.dscale.t.dtype, D);
    if (table_sums) add_row(table_sums, row, D);
  }

  template <class T, class Ty, bool residual, bool normed, bool gated, bool dual>
  void task(int64_t b, int64_t chunk) const {
    const int64_t S = x.size[1], D = x.size[2];
    Scratch scratch((dual ? 6 : 5) * D);
    float *mul = scratch.data, *add = mul + D, *g = add + D, *spare = g + D, *one_plus = spare + D;
    float* mul2 = one_plus + D;
    float* total = partial + (b * tasks_per_sample(S) + chunk) * sums * D;
    std::memset(total, 0, sums * D * 4);
    const bool tokens = one.modulation.per_token();
    if (normed && !tokens) one.modulation.fold(mul, add, spare, b, 0, D);
    if (dual && !tokens) two.modulation.fold(mul2, add, spare, b, 0, D);
    if (!gate.t) for (int64_t i = 0; i < D; ++i) g[i] = 1.f;
    else if (!gate.per_token()) gate.read(g, b, 0, D);
    const int64_t end = S < (chunk + 1) * kRows ? S : (chunk + 1) * kRows;
    int64_t s = chunk * kRows;
    if (!tokens && !gate.per_token())
      for (; s + kTogether <= end; s += kTogether)
        rows<T, Ty, residual, normed, gated, dual, kTogether>(b, s, mul, mul2, g, total, total + 2 * D, nullptr);
    for (; s < end; ++s) {
      if (normed && tokens) {
        one.modulation.fold(mul, add, spare, b, s, D);
        one.modulation.read_one_plus_scale(one_plus, b, s, D);
        token_gradients<T>(one, b, s, add, spare, tables ? total + 3 * D : nullptr);
      }
      if (dual && tokens) {
        two.modulation.fold(mul2, add, spare, b, s, D);
        token_gradients<T>(two, b, s, add, spare, nullptr);
      }
      if (gate.per_token()) gate.read(g, b, s, D);
      if (dgate.per_token()) std::memset(add, 0, D * 4);
      rows<T, Ty, residual, normed, gated, dual, 1>(b, s, mul, mul2, g, total,
                                                    dgate.per_token() ? add : total + 2 * D,
                                                    tokens ? one_plus : nullptr);
      if (!dgate.per_token()) continue;
      store_row(dgate.row(b, s), add, dgate.t.dtype, D);
      if (tables) add_row(total + 2 * D, add, D);
    }
  }

  template <class T, class Ty> void task(int64_t b, int64_t chunk) const {
    if (two.dh) task<T, T, false, true, false, true>(b, chunk);
    else if (!one.dh) task<T, Ty, true, false, true, false>(b, chunk);
    else if (!y) task<T, T, false, true, false, false>(b, chunk);
    else if (dx_new) task<T, Ty, true, true, true, false>(b, chunk);
    else task<T, Ty, false, true, true, false>(b, chunk);
  }
};

// dscale of a row per sample, sums over its tokens of dh*xhat and dh being given.
void sample_dscale(float* row, float* spare, const Modulation& modulation, const float* dh_xhat, const float* dh,
                   int64_t D) {
  std::memcpy(row, dh_xhat, D * 4);
  if (modulation.weight.t) {
    load_row(spare, modulation.weight.t.data, modulation.weight.t.dtype, D);
    for (int64_t i = 0; i < D; ++i) row[i] *= spare[i];
  }
  if (modulation.bias.t) {
    load_row(spare, modulation.bias.t.data, modulation.bias.t.dtype, D);
    for (int64_t i = 0; i < D; ++i) row[i] += spare[i] * dh[i];
  }
}

// The second stage: per-sample gradients from the partial sums, tasks in order.
void reduce_samples(const Backward& k, int64_t B, int64_t S, int64_t D) {
  const int64_t tasks = tasks_per_sample(S), width = k.sums * D;
  parallel_for(B, tasks * D, [&](int64_t b) {
    float* total = k.partial + b * tasks * width;  // the first task's row becomes the sum
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t i = 0; i < width; ++i) total[i] += total[task * width + i];
    Scratch scratch(2 * D);
    float *row = scratch.data, *spare = row + D;
    const auto put_sums = [&](const Branch& branch, const float* dh_xhat, const float* dh) {
      if (branch.modulation.per_token()) return;
      if (branch.dshift.t) store_row(branch.dshift.row(b, 0), dh, branch.dshift.t.dtype, D);
      if (!branch.dscale.t) return;
      sample_dscale(row, spare, branch.modulation, dh_xhat, dh, D);
      store_row(branch.dscale.row(b, 0), row, branch.dscale.t.dtype, D);
    };
    put_sums(k.one, total, total + D);
    put_sums(k.two, total + 3 * D, total + 4 * D);
    if (k.dgate.t && !k.dgate.per_token()) store_row(k.dgate.row(b, 0), total + 2 * D, k.dgate.t.dtype, D);
  });
}

// dweight = sum_b (1 + scale_b) sum_s dh*xhat, dbias = sum_b (1 + scale_b) sum_s dh, samples in order.
void reduce_batch(const Backward& k, const Tensor& dweight, const Tensor& dbias, int64_t B, int64_t S, int64_t D) {
  const int64_t tasks = tasks_per_sample(S);
  const Modulation& modulation = k.one.modulation;
  Scratch scratch(3 * D);
  float *w = scratch.data, *b_sum = w + D, *one_plus = b_sum + D;
  std::memset(w, 0, 2 * D * 4);
  for (int64_t b = 0; b < B; ++b) {
    const float* total = k.partial + b * tasks * k.sums * D;
    if (!modulation.per_token()) modulation.read_one_plus_scale(one_plus, b, 0, D);
    for (int64_t i = 0; i < D; ++i) {
      const float factor = modulation.per_token() ? 1.f : one_plus[i];
      w[i] += factor * total[i], b_sum[i] += factor * total[D + i];
    }
  }
  if (dweight) store_row(dweight.data, w, dweight.dtype, D);
  if (dbias) store_row(dbias.data, b_sum, dbias.dtype, D);
}

// Gradients of tables: those of the modulations before rounding, samples in order.
void reduce_tables(const Backward& k, const Tensor& dgate_table, const Tensor& dscale_table,
                   const Tensor& dshift_table, int64_t B, int64_t S, int64_t D) {
  const int64_t tasks = tasks_per_sample(S);
  const bool tokens = k.one.modulation.per_token();
  Scratch scratch(5 * D);
  float *gate = scratch.data, *scale = gate + D, *shift = scale + D, *row = shift + D, *spare = row + D;
  std::memset(gate, 0, 3 * D * 4);
  for (int64_t b = 0; b < B; ++b) {
    const float* total = k.partial + b * tasks * k.sums * D;
    if (!tokens) sample_dscale(row, spare, k.one.modulation, total, total + D, D);
    Backward::add_row(gate, total + 2 * D, D);
    Backward::add_row(scale, tokens ? total + 3 * D : row, D);
    Backward::add_row(shift, total + (tokens ? 4 : 1) * D, D);
  }
  if (dgate_table) store_row(dgate_table.data, gate, dgate_table.dtype, D);
  if (dscale_table) store_row(dscale_table.data, scale, dscale_table.dtype, D);
  if (dshift_table) store_row(dshift_table.data, shift, dshift_table.dtype, D);
}

void backward(const Backward& k) {
  const int64_t B = k.x.size[0], S = k.x.size[1], D = k.x.size[2], tasks = tasks_per_sample(S);
  with_types(k.x.dtype, k.y ? k.y.dtype : k.x.dtype, [&](auto tx, auto ty) {
    using T = decltype(tx);
    using Ty = decltype(ty);
    parallel_for(B * tasks, (S < kRows ? S : kRows) * D, [&](int64_t i) {
      k.template task<T, Ty>(i / tasks, i % tasks);
    });
  });
  reduce_samples(k, B, S, D);
}

}  // namespace

void adaln_tables_backward(const Tensor& dx_new, const Tensor& dh, const Tensor& x_new, const Tensor& y,
                           const Tensor& gate, const Tensor& scale, const Tensor& shift, const Tensor& weight,
                           const Tensor& bias, const Tensor& gate_table, const Tensor& scale_table,
                           const Tensor& shift_table, const Tensor& mean, const Tensor& rstd, bool rms,
                           const Tensor& dx, const Tensor& dy, const Tensor& dgate, const Tensor& dscale,
                           const Tensor& dshift, const Tensor& dweight, const Tensor& dbias, const Tensor& dgate_table,
                           const Tensor& dscale_table, const Tensor& dshift_table) {
  const int64_t B = x_new.size[0], S = x_new.size[1], D = x_new.size[2];
  const Branch one{dh, {{scale, scale_table}, {shift, shift_table}, weight, bias}, dscale, dshift};
  const Branch none{kNone, {kNone, kNone, kNone, kNone}, kNone, kNone};
  const bool tables = dgate_table || dscale_table || dshift_table;
  const int sums = tables && one.modulation.per_token() ? 5 : 3;
  Scratch partial(B * tasks_per_sample(S) * sums * D);
  const Backward k{dx_new, x_new, y,  {gate, gate_table}, one, none, mean, rstd, dx, dy, dgate, rms, tables, sums,
                   partial.data};
  backward(k);
  if (dweight || dbias) reduce_batch(k, dweight, dbias, B, S, D);
  if (tables) reduce_tables(k, dgate_table, dscale_table, dshift_table, B, S, D);
}

void adaln_backward(const Tensor& dx_new, const Tensor& dh, const Tensor& x_new, const Tensor& y, const Tensor& gate,
                    const Tensor& scale, const Tensor& shift, const Tensor& weight, const Tensor& bias,
                    const Tensor& mean, const Tensor& rstd, bool rms, const Tensor& dx, const Tensor& dy,
                    const Tensor& dgate, const Tensor& dscale, const Tensor& dshift, const Tensor& dweight,
                    const Tensor& dbias) {
  adaln_tables_backward(dx_new, dh, x_new, y, gate, scale, shift, weight, bias, kNone, kNone, kNone, mean, rstd, rms,
                        dx, dy, dgate, dscale, dshift, dweight, dbias, kNone, kNone, kNone);
}

void norm_modulate_dual_backward(const Tensor& dh, const Tensor& dh2, const Tensor& x, const Tensor& scale,
                                 const Tensor& shift, const Tensor& scale2, const Tensor& shift2, const Tensor& mean,
                                 const Tensor& rstd, bool rms, const Tensor& dx, const Tensor& dscale,
                                 const Tensor& dshift, const Tensor& dscale2, const Tensor& dshift2) {
  const Branch one{dh, {scale, shift, kNone, kNone}, dscale, dshift};
  const Branch two{dh2, {scale2, shift2, kNone, kNone}, dscale2, dshift2};
  Scratch partial(x.size[0] * tasks_per_sample(x.size[1]) * 5 * x.size[2]);
  backward({kNone, x, kNone, kNone, one, two, mean, rstd, dx, kNone, kNone, rms, false, 5, partial.data});
}

// dy = gate * dout, dgate = sum over tokens of dout * y: adaln_backward without the norm (dh absent).
void gate_residual_table_backward(const Tensor& dout, const Tensor& y, const Tensor& gate, const Tensor& gate_table,
                                  const Tensor& dy, const Tensor& dgate, const Tensor& dgate_table) {
  adaln_tables_backward(dout, kNone, dout, y, gate, kNone, kNone, kNone, kNone, gate_table, kNone, kNone, kNone, kNone,
                        true, kNone, dy, dgate, kNone, kNone, kNone, kNone, dgate_table, kNone, kNone);
}

void gate_residual_backward(const Tensor& dout, const Tensor& y, const Tensor& gate, const Tensor& dy,
                            const Tensor& dgate) {
  gate_residual_table_backward(dout, y, gate, kNone, dy, dgate, kNone);
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
