// adaLN's forward on the CPU, contract in kernels/difuse_kernels/adaln/adaln.py. Backward: adaln_backward_cpu.cpp.
//
//   x' = x + gate * y                                       (absent y: x' = x)
//   h  = ((x' - mean) * rstd * w + b) * (1 + scale) + shift  folded to  (x' - mean) * rstd * mul + add
//
// Statistics take two passes over a row that lies in L1.
#include "adaln_cpu.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kStreamBytes = 16 << 20;  // outputs above this leave the caches anyway: write around them

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

template <class T, class Ty> void add_gated(const T* x, const Ty* y, const float* gate, T* out, int64_t D) {
  if (gate)
    each_vector(D, [&](int64_t i, int n) { put(out + i, get(x + i, n) + get(gate + i, n) * get(y + i, n), n); });
  else
    each_vector(D, [&](int64_t i, int n) { put(out + i, get(x + i, n) + get(y + i, n), n); });
}

struct Forward {
  const Tensor &x, &y;
  Rows gate;
  Modulation modulation, second;  // the second only where there is h2
  float eps;
  const Tensor &x_new, &h, &h2, &mean, &rstd;

  template <class T, class Ty, bool rms, bool streamed> void task(int64_t b, int64_t chunk) const {
    const int64_t S = x.size[1], D = x.size[2];
    Scratch scratch((h2 ? 6 : 4) * D);
    float *mul = scratch.data, *add = mul + D, *g = add + D, *spare = g + D, *mul2 = spare + D, *add2 = mul2 + D;
    if (!modulation.per_token()) modulation.fold(mul, add, spare, b, 0, D);
    if (h2 && !second.per_token()) second.fold(mul2, add2, spare, b, 0, D);
    if (gate.t && !gate.per_token()) gate.read(g, b, 0, D);
    for (int64_t s = chunk * kRows; s < S && s < (chunk + 1) * kRows; ++s) {
      if (modulation.per_token()) modulation.fold(mul, add, spare, b, s, D);
      if (h2 && second.per_token()) second.fold(mul2, add2, spare, b, s, D);
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
      modulated<T, streamed>(at<T>(h, b, s), xs, m, r, mul, add, D);
      if (h2) modulated<T, streamed>(at<T>(h2, b, s), xs, m, r, mul2, add2, D);
    }
    if (streamed) stream_fence();
  }

  template <class T, bool streamed>
  static void modulated(T* h, const T* x, float m, float r, const float* mul, const float* add, int64_t D) {
    if (streamed) {
      for (int64_t i = 0; i < D; i += VL) stream(h + i, (load(x + i) - m) * r * load(mul + i) + load(add + i));
    } else {
      each_vector(D, [&](int64_t i, int n) {
        put(h + i, (get(x + i, n) - m) * r * get(mul + i, n) + get(add + i, n), n);
      });
    }
  }
};

void forward(const Forward& k, bool rms) {
  const Tensor& x = k.x;
  const int64_t B = x.size[0], S = x.size[1], D = x.size[2], tasks = tasks_per_sample(S);
  const bool streamed = streams(k.h, B, S, D) && (!k.h2 || streams(k.h2, B, S, D));
  with_types(x.dtype, k.y ? k.y.dtype : x.dtype, [&](auto tx, auto ty) {
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

void gate_residual(const Tensor& x, const Tensor& y, const Rows& gate, const Tensor& out) {
  const int64_t B = x.size[0], S = x.size[1], D = x.size[2], tasks = tasks_per_sample(S);
  with_types(x.dtype, y.dtype, [&](auto tx, auto ty) {
    using T = decltype(tx);
    using Ty = decltype(ty);
    parallel_for(B * tasks, (S < kRows ? S : kRows) * D, [&](int64_t task) {
      const int64_t b = task / tasks, begin = task % tasks * kRows;
      Scratch g(D);
      if (gate.t) gate.read(g.data, b, begin, D);
      for (int64_t s = begin; s < S && s < begin + kRows; ++s) {
        if (gate.per_token()) gate.read(g.data, b, s, D);
        add_gated<T, Ty>(at<T>(x, b, s), at<Ty>(y, b, s), gate.t ? g.data : nullptr, at<T>(out, b, s), D);
      }
    });
  });
}

}  // namespace

void adaln_forward(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& scale, const Tensor& shift,
                   const Tensor& weight, const Tensor& bias, bool rms, float eps, const Tensor& x_new, const Tensor& h,
                   const Tensor& mean, const Tensor& rstd) {
  forward({x, y, gate, {scale, shift, weight, bias}, {kNone, kNone, kNone, kNone}, eps, x_new, h, kNone, mean, rstd},
          rms);
}

void adaln_tables_forward(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& scale,
                          const Tensor& shift, const Tensor& weight, const Tensor& bias, const Tensor& gate_table,
                          const Tensor& scale_table, const Tensor& shift_table, bool rms, float eps,
                          const Tensor& x_new, const Tensor& h, const Tensor& mean, const Tensor& rstd) {
  forward({x, y, {gate, gate_table}, {{scale, scale_table}, {shift, shift_table}, weight, bias},
           {kNone, kNone, kNone, kNone}, eps, x_new, h, kNone, mean, rstd}, rms);
}

void norm_modulate_dual_forward(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& scale2,
                                const Tensor& shift2, bool rms, float eps, const Tensor& h, const Tensor& h2,
                                const Tensor& mean, const Tensor& rstd) {
  forward({x, kNone, kNone, {scale, shift, kNone, kNone}, {scale2, shift2, kNone, kNone}, eps, kNone, h, h2, mean,
           rstd}, rms);
}

void gate_residual_forward(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& out) {
  gate_residual(x, y, gate, out);
}

void gate_residual_table_forward(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& gate_table,
                                 const Tensor& out) {
  gate_residual(x, y, {gate, gate_table}, out);
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
