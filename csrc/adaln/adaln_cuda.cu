// adaLN's forward on GPUs, contract in kernels/difuse_kernels/adaln/adaln.py. Backward: adaln_backward_cuda.cu.
//
//   x' = x + gate * y                                       (absent y: x' = x)
//   h  = ((x' - mean) * rstd * w + b) * (1 + scale) + shift
//
// A row lies in the registers of one warp (of 2, 4, .. 16 beyond D = 1280 in bfloat16), up to 5 vectors of 16 bytes a
// lane, so that x and y are read once, statistics take two passes over registers, and up to D = 1280 no warp waits for
// another. x and y of a row are under way before anything is waited for: at D = 1152 5 KB a warp, at 16 warps (104
// registers) a multiprocessor almost 4 times the 22 KB that 4.3 TB/s need, and [8,256,1152] is a single wave of them.
// Bytes per element and the time they take at 4.3 TB/s in bfloat16:
//
//                                        bytes   [8,256,1152]   [16,1024,1152]
//   norm_modulate                        4       2.2 us         17.6 us
//   gate_residual                        6       3.3 us         26.3 us
//   gate_residual_norm_modulate          8       4.4 us         35.1 us
//
// Modulation rows are shared by the tokens of a sample and come from L1 or L2.
#include "adaln_cuda.h"

namespace difuse {
namespace cuda {
namespace {

constexpr int kVectors = 5;  // of a row, the most that a thread holds

struct Forward {
  Rows x, y, gate, scale, shift, weight, bias, x_new, h, mean, rstd;
  int64_t S, D;
  Teams teams;
  float eps;
  bool rms;
};

__device__ __forceinline__ void save_statistics(const Forward& p, int64_t b, int64_t s, float mean, float rstd) {
  if (p.mean.given() && p.teams.thread() == 0) p.mean.row<float>(b, 0)[s] = mean, p.rstd.row<float>(b, 0)[s] = rstd;
}

// A thread's share of a row: N vectors of E elements, those of a team side by side. All but the last are inside it.
template <int E, int N> struct Share {
  int first, step;
  bool last;

  __device__ Share(const Teams& teams, int64_t D)
      : first(teams.thread() * E), step(teams.size() * E), last(first + (N - 1) * step < D) {}
  __device__ int at(int v) const { return first + v * step; }
  __device__ bool inside(int v) const { return v < N - 1 || last; }

  template <class T> __device__ __forceinline__ void load(Raw<T, E> (&to)[N], const T* row) const {
#pragma unroll
    for (int v = 0; v < N; ++v) {
      to[v] = {};
      if (inside(v)) to[v].load(row + at(v));
    }
  }
  // body(value, operand's element) for every element of `values`, if the operand is given.
  template <class T, class F>
  __device__ __forceinline__ void combine(float (&values)[N][E], const Rows& rows, int64_t b, int64_t s, F body) const {
    if (!rows.given()) return;
    typed_beside<T>(rows.dtype, [&](auto type) {
      using M = decltype(type);
      Raw<M, E> raw[N];
      load(raw, rows.row<M>(b, s));
#pragma unroll
      for (int v = 0; v < N; ++v) {
        float operand[E];
        raw[v].get(operand);
#pragma unroll
        for (int j = 0; j < E; ++j) body(values[v][j], operand[j]);
      }
    });
  }
};

template <class T, class Y, int N>
__global__ void __launch_bounds__(kMaxTeam * kWarp, 1) forward_kernel(const Forward p) {
  constexpr int E = kWide<T>;
  __shared__ float parts[2][kMaxTeam];
  const int64_t b = p.teams.sample(), s = p.teams.token();
  if (s >= p.S) return;  // a whole warp, and only where warps do not meet
  const Share<E, N> share(p.teams, p.D);
  Raw<T, E> x_raw[N];
  Raw<Y, E> y_raw[N];
  float x[N][E], gate[N][E];
  share.load(x_raw, p.x.row<T>(b, s));
  if (p.y.given()) {
    share.load(y_raw, p.y.row<Y>(b, s));
#pragma unroll
    for (int v = 0; v < N; ++v)
#pragma unroll
      for (int j = 0; j < E; ++j) gate[v][j] = 1;
    share.template combine<T>(gate, p.gate, b, s, [](float& to, float g) { to = g; });
#pragma unroll
    for (int v = 0; v < N; ++v) {
      float y[E];
      x_raw[v].get(x[v]);
      y_raw[v].get(y);
#pragma unroll
      for (int j = 0; j < E; ++j) x[v][j] += gate[v][j] * y[j];
      x_raw[v].set(x[v]);
      if (share.inside(v)) x_raw[v].store(p.x_new.row<T>(b, s) + share.at(v));
    }
    if (!p.h.given()) return;
  }
  float total = 0;
#pragma unroll
  for (int v = 0; v < N; ++v) {
    x_raw[v].get(x[v]);  // the rounded sum is what gets normalised
    total += sum(x[v]);
  }
  const float mean = p.rms ? 0.f : p.teams.sum(total, parts[0]) / float(p.D);
  total = 0;
#pragma unroll
  for (int v = 0; v < N; ++v) {
    float squares[E];
#pragma unroll
    for (int j = 0; j < E; ++j) x[v][j] -= mean, squares[j] = x[v][j] * x[v][j];
    if (share.inside(v)) total += sum(squares);
  }
  const float rstd = 1.f / sqrtf(p.teams.sum(total, parts[1]) / float(p.D) + p.eps);
  save_statistics(p, b, s, mean, rstd);
#pragma unroll
  for (int v = 0; v < N; ++v)
#pragma unroll
    for (int j = 0; j < E; ++j) x[v][j] *= rstd;
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {  // h * w + b, then h * (1 + scale) + shift, by the same code
    const float one = i;
    share.template combine<T>(x, i ? p.scale : p.weight, b, s, [&](float& h, float scale) { h *= one + scale; });
    share.template combine<T>(x, i ? p.shift : p.bias, b, s, [](float& h, float shift) { h += shift; });
  }
#pragma unroll
  for (int v = 0; v < N; ++v) {
    Raw<T, E> h;
    h.set(x[v]);
    if (share.inside(v)) h.store(p.h.row<T>(b, s) + share.at(v));
  }
}

// Any D, any alignment: a thread takes every size()-th element and reads x' again for each pass.
template <class T> __global__ void __launch_bounds__(kMaxTeam * kWarp, 1) forward_any_kernel(const Forward p) {
  __shared__ float parts[2][kMaxTeam];
  const int64_t b = p.teams.sample(), s = p.teams.token();
  if (s >= p.S) return;
  const int64_t first = p.teams.thread(), step = p.teams.size();
  const Rows rows = p.y.given() ? p.x_new : p.x;  // of x'; a thread reads what it wrote itself
  const T* const x = rows.row<T>(b, s);
  if (p.y.given()) {
    for (int64_t i = first; i < p.D; i += step) {
      const float gate = p.gate.given() ? element(p.gate, b, s, i) : 1.f;
      from_float(p.x_new.row<T>(b, s)[i], to_float(p.x.row<T>(b, s)[i]) + gate * element(p.y, b, s, i));
    }
    if (!p.h.given()) return;
  }
  float total = 0;
  if (!p.rms)
    for (int64_t i = first; i < p.D; i += step) total += to_float(x[i]);
  const float mean = p.rms ? 0.f : p.teams.sum(total, parts[0]) / float(p.D);
  total = 0;
  for (int64_t i = first; i < p.D; i += step) {
    const float centred = to_float(x[i]) - mean;
    total += centred * centred;
  }
  const float rstd = 1.f / sqrtf(p.teams.sum(total, parts[1]) / float(p.D) + p.eps);
  save_statistics(p, b, s, mean, rstd);
  for (int64_t i = first; i < p.D; i += step) {
    float h = (to_float(x[i]) - mean) * rstd;
    if (p.weight.given()) h *= element(p.weight, b, s, i);
    if (p.bias.given()) h += element(p.bias, b, s, i);
    if (p.scale.given()) h *= 1.f + element(p.scale, b, s, i);
    if (p.shift.given()) h += element(p.shift, b, s, i);
    from_float(p.h.row<T>(b, s)[i], h);
  }
}

// The fewest warps, a power of two, that hold `vectors` vectors in registers, up to kMaxTeam.
int team(int64_t vectors) {
  int warps = 1;
  while (warps < kMaxTeam && vectors > warps * kWarp * kVectors) warps *= 2;
  return warps;
}

template <class T, class Y> void forward_wide(Queue& queue, const char* name, int64_t B, const Forward& p) {
  const Teams& teams = p.teams;
  void (*const kernels[kVectors])(Forward) = {forward_kernel<T, Y, 1>, forward_kernel<T, Y, 2>,
                                              forward_kernel<T, Y, 3>, forward_kernel<T, Y, 4>,
                                              forward_kernel<T, Y, 5>};
  const int64_t n = ceil_div(p.D / kWide<T>, teams.warps * kWarp);
  launch(queue, name, kernels[n - 1], teams.blocks(B), teams.threads(), 0, p);
}

void forward(Queue& queue, const char* name, const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& scale,
             const Tensor& shift, const Tensor& weight, const Tensor& bias, bool rms, float eps, const Tensor& x_new,
             const Tensor& h, const Tensor& mean, const Tensor& rstd) {
  const int64_t B = x.size[0], S = x.size[1], D = x.size[2];
  if (B == 0 || S == 0) return;
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int E = kWide<T>;
    bool wide = D > 0 && D % E == 0 && D <= int64_t(E) * kVectors * kMaxTeam * kWarp;
    for (const Tensor* t : {&x, &y, &x_new, &h}) wide = wide && vectors(*t, E);
    for (const Tensor* t : {&gate, &scale, &shift, &weight, &bias}) wide = wide && vectors(*t, E) && beside<T>(*t);
    const Teams teams(team(ceil_div(D, E)), S);
    const Forward p{x, y, gate, scale, shift, weight, bias, x_new, h, mean, rstd, S, D, teams, eps, rms};
    if (wide && (!y || y.dtype == x.dtype)) return forward_wide<T, T>(queue, name, B, p);
    if constexpr (sizeof(T) == 4) {  // the residual stream in float32, branches narrower: autocast
      if (wide && y.dtype == DType::bf16) return forward_wide<T, bf16>(queue, name, B, p);
      if (wide) return forward_wide<T, f16>(queue, name, B, p);
    }
    launch(queue, name, forward_any_kernel<T>, teams.blocks(B), teams.threads(), 0, p);
  });
}

}  // namespace

void adaln_forward(Queue& queue, const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& scale,
                   const Tensor& shift, const Tensor& weight, const Tensor& bias, bool rms, float eps,
                   const Tensor& x_new, const Tensor& h, const Tensor& mean, const Tensor& rstd) {
  forward(queue, "adaln_forward", x, y, gate, scale, shift, weight, bias, rms, eps, x_new, h, mean, rstd);
}

void gate_residual_forward(Queue& queue, const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& out) {
  const Tensor none;
  forward(queue, "gate_residual_forward", x, y, gate, none, none, none, none, true, 0.f, out, none, none, none);
}

}  // namespace cuda
}  // namespace difuse
