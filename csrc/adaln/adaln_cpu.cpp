// adaLN on the CPU, contract in kernels/difuse_kernels/adaln/adaln.py.
//
//   x' = x + gate * y                                       (absent y: x' = x)
//   h  = ((x' - mean) * rstd * w + b) * (1 + scale) + shift  folded to  (x' - mean) * rstd * mul + add
//
// A task is kRows consecutive tokens of one sample: modulation rows are converted once per task, and sums over tokens are
// taken task by task into `partial` and then in task order, so that results depend neither on the thread count nor on the
// other samples of the batch. Statistics take two passes over a row that lies in L1.
#include "../common/parallel.h"
#include "../common/rows.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kRows = 32;
constexpr int kTogether = 4;  // rows whose contributions to a token sum are added in registers before touching memory
constexpr int64_t kStreamBytes = 16 << 20;  // outputs above this leave the caches anyway: write around them

int64_t tasks_per_sample(int64_t S) { return S ? (S + kRows - 1) / kRows : 1; }  // none: sums are still zeros

// A modulation operand: absent, one row per sample [B,D], or one per token [B,S,D].
struct Rows {
  const Tensor& t;
  bool per_token() const { return t && t.ndim == 3; }
  char* row(int64_t b, int64_t s) const {
    const int64_t offset = b * t.stride[0] + (t.ndim == 3 ? s * t.stride[1] : 0);
    return t.data + offset * element_size(t.dtype);
  }
  void read(float* to, int64_t b, int64_t s, int64_t D) const { load_row(to, row(b, s), t.dtype, D); }
};

#if defined(DIFUSE_AVX512)
void stream(float* p, vf v) { _mm512_stream_ps(p, (__m512)v); }
void stream(bf16* p, vf v) { _mm256_stream_si256((__m256i*)p, (__m256i)to_bf16(v)); }
#elif defined(DIFUSE_AVX2)
void stream(float* p, vf v) { _mm256_stream_ps(p, (__m256)v); }
void stream(bf16* p, vf v) { _mm_stream_si128((__m128i*)p, (__m128i)to_bf16(v)); }
#endif
template <class T> void stream(T* p, vf v) { store(p, v); }
void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
// Whole aligned rows of an output too large to stay in cache.
bool streams(const Tensor& out, int64_t B, int64_t S, int64_t D) {
  const int64_t row = D * element_size(out.dtype);
  return B * S * row > kStreamBytes && row % 64 == 0 && reinterpret_cast<uintptr_t>(out.data) % 64 == 0 &&
         out.stride[1] * element_size(out.dtype) % 64 == 0 && out.stride[0] * element_size(out.dtype) % 64 == 0;
}

template <class F> float row_sum(int64_t D, F term) {  // four chains hide the latency of the addition
  vf a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * VL <= D; i += 4 * VL) {
    a += term(i, VL), b += term(i + VL, VL), c += term(i + 2 * VL, VL), d += term(i + 3 * VL, VL);
  }
  for (; i + VL <= D; i += VL) a += term(i, VL);
  if (i < D) b += term(i, int(D - i));
  return hsum((a + b) + (c + d));
}
// Lanes at n and beyond set to zero.
vf first(vf v, int n) {
  if (n == VL) return v;
  for (int i = n; i < VL; ++i) v[i] = 0;
  return v;
}

// mul = w (1 + scale), add = b (1 + scale) + shift; absent operands are 1, 0, 0, 0.
struct Modulation {
  Rows scale, shift, weight, bias;
  bool per_token() const { return scale.per_token() || shift.per_token(); }
  void read_one_plus_scale(float* to, int64_t b, int64_t s, int64_t D) const {
    if (scale.t) scale.read(to, b, s, D);
    for (int64_t i = 0; i < D; ++i) to[i] = scale.t ? 1.f + to[i] : 1.f;
  }
  void fold(float* mul, float* add, float* scratch, int64_t b, int64_t s, int64_t D) const {
    read_one_plus_scale(mul, b, s, D);
    if (shift.t) shift.read(add, b, s, D);
    else std::memset(add, 0, D * 4);
    if (bias.t) {
      load_row(scratch, bias.t.data, bias.t.dtype, D);
      for (int64_t i = 0; i < D; ++i) add[i] += scratch[i] * mul[i];
    }
    if (weight.t) {
      load_row(scratch, weight.t.data, weight.t.dtype, D);
      for (int64_t i = 0; i < D; ++i) mul[i] *= scratch[i];
    }
  }
};

struct Forward {
  const Tensor &x, &y;
  Rows gate;
  Modulation modulation;
  float eps;
  const Tensor &x_new, &h, &mean, &rstd;

  template <class T, class Ty, bool rms, bool streamed> void task(int64_t b, int64_t chunk) const {
    const int64_t S = x.size[1], D = x.size[2];
    Scratch scratch(4 * D);
    float *mul = scratch.data, *add = mul + D, *g = add + D, *spare = g + D;
    if (!modulation.per_token()) modulation.fold(mul, add, spare, b, 0, D);
    if (gate.t && !gate.per_token()) gate.read(g, b, 0, D);
    for (int64_t s = chunk * kRows; s < S && s < (chunk + 1) * kRows; ++s) {
      if (modulation.per_token()) modulation.fold(mul, add, spare, b, s, D);
      if (gate.per_token()) gate.read(g, b, s, D);
      const T* xs = at<T>(x, b, s);
      if (y) {
        add_gated<T, Ty>(xs, at<Ty>(y, b, s), gate.t ? g : nullptr, at<T>(x_new, b, s), D);
        xs = at<T>(x_new, b, s);  // the rounded sum is what gets normalised
      }
      const float m = rms ? 0.f : row_sum(D, [&](int64_t i, int n) { return get(xs + i, n); }) / float(D);
      const float variance = row_sum(D, [&](int64_t i, int n) {
        const vf centred = first(get(xs + i, n) - m, n);
        return centred * centred;
      }) / float(D);
      const float r = 1.f / __builtin_sqrtf(variance + eps);
      if (mean) at<float>(mean, b)[s] = m, at<float>(rstd, b)[s] = r;
      T* hs = at<T>(h, b, s);
      if (streamed) {
        for (int64_t i = 0; i < D; i += VL) stream(hs + i, (load(xs + i) - m) * r * load(mul + i) + load(add + i));
      } else {
        each_vector(D, [&](int64_t i, int n) {
          put(hs + i, (get(xs + i, n) - m) * r * get(mul + i, n) + get(add + i, n), n);
        });
      }
    }
    if (streamed) stream_fence();
  }

  template <class T, class Ty>
  static void add_gated(const T* x, const Ty* y, const float* gate, T* out, int64_t D) {
    if (gate)
      each_vector(D, [&](int64_t i, int n) { put(out + i, get(x + i, n) + get(gate + i, n) * get(y + i, n), n); });
    else
      each_vector(D, [&](int64_t i, int n) { put(out + i, get(x + i, n) + get(y + i, n), n); });
  }
};

struct Backward {
  const Tensor &dx_new, &dh, &x, &y;
  Rows gate;
  Modulation modulation;
  const Tensor &mean, &rstd, &dx, &dy;
  Rows dgate, dscale, dshift;
  float* partial;  // [B, tasks, 3, D]: sums over the task's tokens of dh*xhat, dh (times 1+scale if per token), dx*y
  bool rms;

  // R tokens from s on. residual: dx_new is there; normed: dh is; gated: y is. c1, c2 are the two row means of the norm's
  // backward (c1 is 0 for RMSNorm). With per-token modulation the sums take 1 + scale along.
  template <class T, class Ty, bool residual, bool normed, bool gated, int R>
  void rows(int64_t b, int64_t s, const float* mul, const float* g, float* a_sum, float* b_sum, float* g_sum,
            const float* one_plus_scale) const {
    const int64_t D = x.size[2];
    float m[R] = {}, r[R] = {}, c1[R] = {}, c2[R] = {};
    const T *xs[R] = {}, *dhs[R] = {}, *dxs_new[R] = {};
    const Ty* ys[R] = {};
    T* dxs[R] = {};
    Ty* dys[R] = {};
    for (int k = 0; k < R; ++k) {
      if (residual) dxs_new[k] = at<T>(dx_new, b, s + k);
      if (gated) ys[k] = at<Ty>(y, b, s + k), dys[k] = at<Ty>(dy, b, s + k);
      if (!normed) continue;
      xs[k] = at<T>(x, b, s + k), dhs[k] = at<T>(dh, b, s + k), dxs[k] = at<T>(dx, b, s + k);
      m[k] = at<float>(mean, b)[s + k];
      r[k] = at<float>(rstd, b)[s + k];
      vf sum1 = {}, sum2 = {}, sum3 = {}, sum4 = {};
      const auto add = [&](vf& s1, vf& s2, int64_t i, int n) {
        const vf grad = get(dhs[k] + i, n) * get(mul + i, n);
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
      vf a = {}, bb = {}, gg = {};
      for (int k = 0; k < R; ++k) {
        vf grad = residual ? get(dxs_new[k] + i, n) : vf{};
        if (normed) {
          const vf dh_i = get(dhs[k] + i, n);
          const vf xhat = (get(xs[k] + i, n) - m[k]) * r[k];
          grad += r[k] * (dh_i * mul_i - c1[k] - xhat * c2[k]);
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
      if (gated) put(g_sum + i, get(g_sum + i, n) + gg, n);
    });
  }

  // Per-token modulation: its gradients are rows of their own, dscale = dh * n with n = xhat*w + b, dshift = dh.
  template <class T> void token_gradients(int64_t b, int64_t s, float* row, float* spare) const {
    const int64_t D = x.size[2];
    const T* dhs = at<T>(dh, b, s);
    if (dshift.per_token()) {
      each_vector(D, [&](int64_t i, int n) { put(row + i, get(dhs + i, n), n); });
      store_row(dshift.row(b, s), row, dshift.t.dtype, D);
    }
    if (!dscale.per_token()) return;
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
    store_row(dscale.row(b, s), row, dscale.t.dtype, D);
  }

  template <class T, class Ty, bool residual, bool normed, bool gated> void task(int64_t b, int64_t chunk) const {
    const int64_t S = x.size[1], D = x.size[2];
    Scratch scratch(5 * D);
    float *mul = scratch.data, *add = mul + D, *g = add + D, *spare = g + D, *one_plus = spare + D;
    float* sums = partial + (b * tasks_per_sample(S) + chunk) * 3 * D;
    std::memset(sums, 0, 3 * D * 4);
    const bool token_rows = modulation.per_token() || gate.per_token();
    if (normed && !modulation.per_token()) modulation.fold(mul, add, spare, b, 0, D);
    if (!gate.t) for (int64_t i = 0; i < D; ++i) g[i] = 1.f;
    else if (!gate.per_token()) gate.read(g, b, 0, D);
    const int64_t end = S < (chunk + 1) * kRows ? S : (chunk + 1) * kRows;
    int64_t s = chunk * kRows;
    if (!token_rows)
      for (; s + kTogether <= end; s += kTogether)
        rows<T, Ty, residual, normed, gated, kTogether>(b, s, mul, g, sums, sums + D, sums + 2 * D, nullptr);
    for (; s < end; ++s) {
      if (normed && modulation.per_token()) {
        modulation.fold(mul, add, spare, b, s, D);
        modulation.read_one_plus_scale(one_plus, b, s, D);
        token_gradients<T>(b, s, add, spare);
      }
      if (gate.per_token()) gate.read(g, b, s, D);
      if (dgate.per_token()) std::memset(add, 0, D * 4);
      rows<T, Ty, residual, normed, gated, 1>(b, s, mul, g, sums, sums + D, dgate.per_token() ? add : sums + 2 * D,
                                              modulation.per_token() ? one_plus : nullptr);
      if (dgate.per_token()) store_row(dgate.row(b, s), add, dgate.t.dtype, D);
    }
  }

  template <class T, class Ty> void task(int64_t b, int64_t chunk) const {
    if (!dh) task<T, Ty, true, false, true>(b, chunk);
    else if (!y) task<T, T, false, true, false>(b, chunk);
    else if (dx_new) task<T, Ty, true, true, true>(b, chunk);
    else task<T, Ty, false, true, true>(b, chunk);
  }
};

// The second stage: per-sample gradients from the partial sums, tasks in order.
void reduce_samples(const Backward& k, int64_t B, int64_t S, int64_t D) {
  const int64_t tasks = tasks_per_sample(S);
  parallel_for(B, tasks * D, [&](int64_t b) {
    float* total = k.partial + b * tasks * 3 * D;  // the first task's row becomes the sum
    for (int64_t task = 1; task < tasks; ++task)
      for (int64_t i = 0; i < 3 * D; ++i) total[i] += total[task * 3 * D + i];
    Scratch scratch(2 * D);
    float *row = scratch.data, *spare = row + D;
    const bool sample_rows = !k.modulation.per_token();
    if (k.dshift.t && sample_rows) store_row(k.dshift.row(b, 0), total + D, k.dshift.t.dtype, D);
    if (k.dscale.t && sample_rows) {
      std::memcpy(row, total, D * 4);
      if (k.modulation.weight.t) {
        load_row(spare, k.modulation.weight.t.data, k.modulation.weight.t.dtype, D);
        for (int64_t i = 0; i < D; ++i) row[i] *= spare[i];
      }
      if (k.modulation.bias.t) {
        load_row(spare, k.modulation.bias.t.data, k.modulation.bias.t.dtype, D);
        for (int64_t i = 0; i < D; ++i) row[i] += spare[i] * total[D + i];
      }
      store_row(k.dscale.row(b, 0), row, k.dscale.t.dtype, D);
    }
    if (k.dgate.t && !k.dgate.per_token()) store_row(k.dgate.row(b, 0), total + 2 * D, k.dgate.t.dtype, D);
  });
}

// dweight = sum_b (1 + scale_b) sum_s dh*xhat, dbias = sum_b (1 + scale_b) sum_s dh, samples in order.
void reduce_batch(const Backward& k, const Tensor& dweight, const Tensor& dbias, int64_t B, int64_t S, int64_t D) {
  const int64_t tasks = tasks_per_sample(S);
  Scratch scratch(3 * D);
  float *w = scratch.data, *b_sum = w + D, *one_plus = b_sum + D;
  std::memset(w, 0, 2 * D * 4);
  for (int64_t b = 0; b < B; ++b) {
    const float* total = k.partial + b * tasks * 3 * D;
    if (!k.modulation.per_token()) k.modulation.read_one_plus_scale(one_plus, b, 0, D);
    for (int64_t i = 0; i < D; ++i) {
      const float factor = k.modulation.per_token() ? 1.f : one_plus[i];
      w[i] += factor * total[i], b_sum[i] += factor * total[D + i];
    }
  }
  if (dweight) store_row(dweight.data, w, dweight.dtype, D);
  if (dbias) store_row(dbias.data, b_sum, dbias.dtype, D);
}

template <class F> void with_types(DType x, DType y, F body) {
  with_type(x, [&](auto tx) { with_type(y, [&](auto ty) { body(tx, ty); }); });
}

}  // namespace

void adaln_forward(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& scale, const Tensor& shift,
                   const Tensor& weight, const Tensor& bias, bool rms, float eps, const Tensor& x_new, const Tensor& h,
                   const Tensor& mean, const Tensor& rstd) {
  const Forward k{x, y, {gate}, {{scale}, {shift}, {weight}, {bias}}, eps, x_new, h, mean, rstd};
  const int64_t B = x.size[0], S = x.size[1], D = x.size[2], tasks = tasks_per_sample(S);
  const bool streamed = streams(h, B, S, D);
  with_types(x.dtype, y ? y.dtype : x.dtype, [&](auto tx, auto ty) {
    using T = decltype(tx);
    using Ty = decltype(ty);
    const auto run = [&](auto task) {
      parallel_for(B * tasks, (S < kRows ? S : kRows) * D, [&](int64_t i) { task(i / tasks, i % tasks); });
    };
    if (rms && streamed) run([&](int64_t b, int64_t c) { k.template task<T, Ty, true, true>(b, c); });
    else if (rms) run([&](int64_t b, int64_t c) { k.template task<T, Ty, true, false>(b, c); });
    else if (streamed) run([&](int64_t b, int64_t c) { k.template task<T, Ty, false, true>(b, c); });
    else run([&](int64_t b, int64_t c) { k.template task<T, Ty, false, false>(b, c); });
  });
}

void adaln_backward(const Tensor& dx_new, const Tensor& dh, const Tensor& x_new, const Tensor& y, const Tensor& gate,
                    const Tensor& scale, const Tensor& shift, const Tensor& weight, const Tensor& bias,
                    const Tensor& mean, const Tensor& rstd, bool rms, const Tensor& dx, const Tensor& dy,
                    const Tensor& dgate, const Tensor& dscale, const Tensor& dshift, const Tensor& dweight,
                    const Tensor& dbias) {
  const int64_t B = x_new.size[0], S = x_new.size[1], D = x_new.size[2], tasks = tasks_per_sample(S);
  Scratch partial(B * tasks * 3 * D);
  const Backward k{dx_new, dh,   x_new, y,    {gate},  {{scale}, {shift}, {weight}, {bias}},
                   mean,   rstd, dx,    dy,   {dgate}, {dscale},
                   {dshift}, partial.data, rms};
  with_types(x_new.dtype, y ? y.dtype : x_new.dtype, [&](auto tx, auto ty) {
    using T = decltype(tx);
    using Ty = decltype(ty);
    parallel_for(B * tasks, (S < kRows ? S : kRows) * D, [&](int64_t i) {
      k.template task<T, Ty>(i / tasks, i % tasks);
    });
  });
  reduce_samples(k, B, S, D);
  if (dweight || dbias) reduce_batch(k, dweight, dbias, B, S, D);
}

void gate_residual_forward(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& out) {
  const int64_t B = x.size[0], S = x.size[1], D = x.size[2], tasks = tasks_per_sample(S);
  const Rows gates{gate};
  with_types(x.dtype, y.dtype, [&](auto tx, auto ty) {
    using T = decltype(tx);
    using Ty = decltype(ty);
    parallel_for(B * tasks, (S < kRows ? S : kRows) * D, [&](int64_t task) {
      const int64_t b = task / tasks, begin = task % tasks * kRows;
      Scratch g(D);
      if (gate) gates.read(g.data, b, begin, D);
      for (int64_t s = begin; s < S && s < begin + kRows; ++s) {
        if (gates.per_token()) gates.read(g.data, b, s, D);
        Forward::add_gated<T, Ty>(at<T>(x, b, s), at<Ty>(y, b, s), gate ? g.data : nullptr, at<T>(out, b, s), D);
      }
    });
  });
}

// dy = gate * dout, dgate = sum over tokens of dout * y: adaln_backward without the norm (dh absent).
void gate_residual_backward(const Tensor& dout, const Tensor& y, const Tensor& gate, const Tensor& dy,
                            const Tensor& dgate) {
  const Tensor none;
  adaln_backward(dout, none, dout, y, gate, none, none, none, none, none, none, true, none, dy, dgate, none, none, none,
                 none);
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
