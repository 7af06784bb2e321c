// adaLN's backward on GPUs. With xhat = (x' - mean) * rstd, dn = dh * (1 + scale) and g = dn * w:
//
//   dx     = dx_new + rstd * (g - mean(g) - xhat * mean(g * xhat))       (RMSNorm: without mean(g))
//   dy     = dx * gate              dgate  = sum_s dx * y                dshift = sum_s dh
//   dscale = sum_s dh * (xhat * w + b)       dweight = sum_bs dn * xhat          dbias = sum_bs dn
//
// Sums over tokens take two stages: a block walks over a run of tokens of one sample, a thread keeps the sums of the
// columns of its vector in registers and leaves them in [B,runs,sums,D]; then runs are added in order, and samples in
// order. Runs depend on S alone. dh and x of the next token are under way while a row waits for its two means, which
// cost one barrier, and so are dx_new and y of this one: at D = 1152 in bfloat16 9 KB a block and 4 blocks (96
// registers) a multiprocessor, where 4.3 TB/s need 22 KB. Bytes per element and the time they take at 4.3 TB/s in
// bfloat16, in brackets with the partial sums written and read at the same rate (they mostly stay in L2):
//
//                                        bytes   [8,256,1152]       [16,1024,1152]
//   norm_modulate                        6       3.3 us (5.5)       26.3 us (30.7)
//   gate_residual                        6       3.3 us (4.4)       26.3 us (28.5)
//   gate_residual_norm_modulate          12      6.6 us (9.9)       52.7 us (59.3)
#include "adaln_cuda.h"

namespace difuse {
namespace cuda {
namespace {

constexpr int kSums = 3;  // over the tokens of a sample: dn * xhat, dn, dx * y

struct Backward {
  Rows dx_new, dh, x, y, gate, scale, weight, bias, mean, rstd;
  Rows dx, dy, dgate, dscale, dshift;  // the last three only where they have a row per token
  const float* means;  // [B,S,2], of g and g * xhat, for kernels that do not hold a whole row
  float* partial;      // [B,runs,sums,D]
  int slot[kSums];     // where a sum goes in `partial`, -1: nowhere
  int sums;
  int64_t S, D;
  int tokens;            // in a run
  unsigned runs, parts;  // runs of a sample, blocks to a row
  bool scale_tokens, rms;
};

// w * (1 + scale) for E columns: the part of g / dh that tokens share, or all of it for one token.
template <int E> __device__ __forceinline__ void factor_of(float (&to)[E], const Backward& p, int64_t b, int64_t s,
                                                           int64_t at, bool with_scale) {
  float operand[E];
#pragma unroll
  for (int j = 0; j < E; ++j) to[j] = 1;
  if (p.weight.given()) read(to, p.weight, 0, 0, at);
  if (!with_scale || !p.scale.given()) return;
  read(operand, p.scale, b, s, at);
#pragma unroll
  for (int j = 0; j < E; ++j) to[j] *= 1.f + operand[j];
}

// Where a row per token modulates: its gradients dscale = dh * (xhat * w + b) and dshift = dh; dh becomes dn.
template <int E> __device__ __forceinline__ void modulated_token(float (&dh)[E], const float (&xhat)[E],
                                                                 const Backward& p, int64_t b, int64_t s, int64_t at) {
  float scale[E] = {}, w[E], c[E] = {};
  if (p.scale.given()) read(scale, p.scale, b, s, at);
  if (p.dshift.given()) write(p.dshift, b, s, at, dh);
  if (p.dscale.given()) {
#pragma unroll
    for (int j = 0; j < E; ++j) w[j] = 1;
    if (p.weight.given()) read(w, p.weight, 0, 0, at);
    if (p.bias.given()) read(c, p.bias, 0, 0, at);
#pragma unroll
    for (int j = 0; j < E; ++j) w[j] = dh[j] * (xhat[j] * w[j] + c[j]);
    write(p.dscale, b, s, at, w);
  }
#pragma unroll
  for (int j = 0; j < E; ++j) dh[j] *= 1.f + scale[j];
}

// A thread's vectors of one token, as they come from memory.
template <class T, class Y, int E> struct Token {
  Raw<T, E> dx_new, dh, x;
  Raw<Y, E> y;
  float mean, rstd;
};

enum class Kind {
  norm,      // dh alone; a block holds a row and finds the two means
  both,      // dh, and dx_new or y, in the same way
  residual,  // no dh
  any        // means, where there is dh, come from row_means_kernel; rows per token too
};
constexpr int kMaxWhole = 640, kMaxPart = 256;  // threads; the former have 96 registers each

template <Kind K> constexpr bool kWhole = K == Kind::norm || K == Kind::both;

template <class T, class Y, int E, Kind K>
__global__ void __launch_bounds__(kWhole<K> ? kMaxWhole : kMaxPart, kWhole<K> ? 1 : 2)
backward_kernel(const Backward p) {
  constexpr bool WHOLE = kWhole<K>, GATED = K != Kind::norm, AHEAD = K == Kind::residual;
  __shared__ float2 warps[2][kWarp];  // two: a barrier per token is enough
  const unsigned part = blockIdx.x % p.parts, run = blockIdx.x / p.parts % p.runs;
  const unsigned b = blockIdx.x / p.parts / p.runs, at = (part * blockDim.x + threadIdx.x) * E;
  const bool inside = at < p.D, normed = WHOLE || (K == Kind::any && p.dh.given());
  const int64_t first = int64_t(run) * p.tokens, end = first + p.tokens < p.S ? first + p.tokens : p.S;

  using In = Token<T, Y, E>;
  const auto load_norm = [&](In& token, int64_t s) {
    if (!inside || !normed) return;
    token.dh.load(p.dh.row<T>(b, s) + at);
    token.x.load(p.x.row<T>(b, s) + at);
    token.mean = p.mean.row<float>(b, 0)[s];
    token.rstd = p.rstd.row<float>(b, 0)[s];
  };
  const auto load_residual = [&](In& token, int64_t s) {
    if (!inside || !GATED) return;
    if (p.dx_new.given()) token.dx_new.load(p.dx_new.row<T>(b, s) + at);
    if (p.y.given()) token.y.load(p.y.row<Y>(b, s) + at);
  };
  In now, next = {};
  load_norm(next, first);
  if (AHEAD) load_residual(next, first);
  float factor[E] = {}, sums[kSums][E] = {};
  if (inside && normed) factor_of(factor, p, b, 0, at, !p.scale_tokens);

#pragma unroll 1
  for (int64_t s = first; s < end; ++s) {
    now = next;
    if (!AHEAD) load_residual(now, s);  // in time: the two means are waited for first
    if (s + 1 < end) {
      load_norm(next, s + 1);
      if (AHEAD) load_residual(next, s + 1);
    }
    float dx[E] = {};
    if (normed) {
      float dn[E], xhat[E], products[E];
      now.dh.get(dn);
      now.x.get(xhat);
#pragma unroll
      for (int j = 0; j < E; ++j) xhat[j] = (xhat[j] - now.mean) * now.rstd;
      if (K == Kind::any && p.scale_tokens && inside) modulated_token(dn, xhat, p, b, s, at);
#pragma unroll
      for (int j = 0; j < E; ++j) {
        sums[0][j] += dn[j] * xhat[j];
        sums[1][j] += dn[j];
        dx[j] = dn[j] * factor[j];
        products[j] = dx[j] * xhat[j];
      }
      float c1, c2;
      if (WHOLE) {
        c1 = p.rms ? 0.f : lanes_sum(sum(dx));
        c2 = lanes_sum(sum(products));
        float2* const shared = warps[s & 1];
        if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = float2{c1, c2};
        __syncthreads();
        c1 = c2 = 0;
        for (int w = 0; w < int(blockDim.x / kWarp); ++w) c1 += shared[w].x, c2 += shared[w].y;
        c1 /= float(p.D), c2 /= float(p.D);
      } else {
        const float* means = p.means + 2 * (b * p.S + s);
        c1 = means[0], c2 = means[1];
      }
#pragma unroll
      for (int j = 0; j < E; ++j) dx[j] = now.rstd * (dx[j] - c1 - xhat[j] * c2);
    }
    if (!inside) continue;
    if (GATED && p.dx_new.given()) {
      float residual[E];
      now.dx_new.get(residual);
#pragma unroll
      for (int j = 0; j < E; ++j) dx[j] += residual[j];
    }
    if (p.dx.given()) {
      Raw<T, E> out;
      out.set(dx);
      out.store(p.dx.row<T>(b, s) + at);
    }
    if (GATED && p.y.given()) {
      float y[E];
      if (p.dy.given()) {
        float gate[E];
#pragma unroll
        for (int j = 0; j < E; ++j) gate[j] = 1;
        if (p.gate.given()) read(gate, p.gate, b, s, at);  // from L1, as a rule: registers are short
#pragma unroll
        for (int j = 0; j < E; ++j) gate[j] *= dx[j];
        Raw<Y, E> out;
        out.set(gate);
        out.store(p.dy.row<Y>(b, s) + at);
      }
      now.y.get(y);
#pragma unroll
      for (int j = 0; j < E; ++j) y[j] *= dx[j], sums[2][j] += y[j];
      if (!WHOLE && p.dgate.given()) write(p.dgate, b, s, at, y);
    }
  }
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    if (p.slot[i] < 0) continue;
    Raw<float, E> out;
    out.set(sums[i]);
    out.store(p.partial + ((int64_t(b) * p.runs + run) * p.sums + p.slot[i]) * p.D + at);
  }
}

// means [B,S,2] of g and g * xhat, for rows that no block of the kernel above holds.
template <class T, int E> __global__ void __launch_bounds__(kMaxTeam * kWarp, 1)
row_means_kernel(const Backward p, const Teams teams, float* means) {
  __shared__ float parts[2][kMaxTeam];
  const int64_t b = teams.sample(), s = teams.token();
  if (s >= p.S) return;  // a whole warp, and only where warps do not meet
  const float mean = p.mean.row<float>(b, 0)[s], rstd = p.rstd.row<float>(b, 0)[s];
  float c1 = 0, c2 = 0;
  for (int64_t at = int64_t(teams.thread()) * E; at < p.D; at += int64_t(teams.size()) * E) {
    Raw<T, E> dh_raw, x_raw;
    dh_raw.load(p.dh.row<T>(b, s) + at);
    x_raw.load(p.x.row<T>(b, s) + at);
    float g[E], dh[E], x[E];
    factor_of(g, p, b, s, at, true);
    dh_raw.get(dh);
    x_raw.get(x);
#pragma unroll
    for (int j = 0; j < E; ++j) g[j] *= dh[j], x[j] = g[j] * ((x[j] - mean) * rstd);
    c1 += sum(g), c2 += sum(x);
  }
  c1 = teams.sum(c1, parts[0]), c2 = teams.sum(c2, parts[1]);
  if (teams.thread()) return;
  means[2 * (b * p.S + s)] = p.rms ? 0.f : c1 / float(p.D);
  means[2 * (b * p.S + s) + 1] = c2 / float(p.D);
}

// --- the second and third stage --------------------------------------------------------------------------------------
// A block takes 32 columns; warp i adds rows i, i + kGroups, .. and then the warps' sums are added in order.
constexpr int kGroups = 8;
using Groups = float[kSums][kGroups][kWarp];

__device__ __forceinline__ void add_groups(float (&sums)[kSums], Groups& shared) {
  const int group = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kSums; ++i) shared[i][group][lane] = sums[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) sums[i] += shared[i][g][lane];
  }
}

// Gradients of modulations with a row per sample; totals [B,2,D] of dn * xhat and dn, if given, for dweight and dbias.
__global__ void __launch_bounds__(kGroups * kWarp)
sample_sums_kernel(const Backward p, const Rows dgate, const Rows dscale, const Rows dshift, float* totals) {
  __shared__ Groups shared;
  const unsigned parts = unsigned((p.D + kWarp - 1) / kWarp);
  const int64_t b = blockIdx.x / parts, d = int64_t(blockIdx.x % parts) * kWarp + threadIdx.x % kWarp;
  float sums[kSums] = {};
  if (d < p.D) {
#pragma unroll 4
    for (int64_t run = threadIdx.x / kWarp; run < p.runs; run += kGroups) {
      const float* row = p.partial + (b * p.runs + run) * p.sums * p.D + d;
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        if (p.slot[i] >= 0) sums[i] += row[p.slot[i] * p.D];
    }
  }
  add_groups(sums, shared);
  if (threadIdx.x >= kWarp || d >= p.D) return;
  if (totals) totals[2 * b * p.D + d] = sums[0], totals[(2 * b + 1) * p.D + d] = sums[1];
  const auto put = [&](const Rows& rows, float value) {
    const float values[1] = {value};
    if (rows.given()) write(rows, b, 0, d, values);
  };
  put(dgate, sums[2]);
  put(dshift, sums[1]);
  if (p.weight.given()) sums[0] *= element(p.weight, 0, 0, d);
  if (p.bias.given()) sums[0] += sums[1] * element(p.bias, 0, 0, d);
  put(dscale, sums[0]);
}

// dweight = sum_b (1 + scale_b) * total_b, and dbias. A scale with a row per token is in the totals already.
__global__ void __launch_bounds__(kGroups * kWarp)
batch_sums_kernel(const float* totals, const Rows scale, const Rows dweight, const Rows dbias, int64_t B, int64_t D) {
  __shared__ Groups shared;
  const int64_t d = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  float sums[kSums] = {};
  if (d < D) {
#pragma unroll 4
    for (int64_t b = threadIdx.x / kWarp; b < B; b += kGroups) {
      const float factor = scale.given() ? 1.f + element(scale, b, 0, d) : 1.f;
      sums[0] += factor * totals[2 * b * D + d];
      sums[1] += factor * totals[(2 * b + 1) * D + d];
    }
  }
  add_groups(sums, shared);
  if (threadIdx.x >= kWarp || d >= D) return;
  const float w[1] = {sums[0]}, c[1] = {sums[1]};
  if (dweight.given()) write(dweight, 0, 0, d, w);
  if (dbias.given()) write(dbias, 0, 0, d, c);
}

// --- the host --------------------------------------------------------------------------------------------------------
// Tokens of a run: some 64 runs of a sample, more of a long one, so that small batches fill the GPU and partial sums
// stay a small part of the traffic (12 bytes a column and run, beside 12 bytes a column and token).
int run_length(int64_t S) {
  int tokens = 4;
  while (tokens < 128 && tokens * 2 * 64 <= S && int64_t(tokens) * tokens * 16 <= S) tokens *= 2;
  return tokens;
}

int warps_of(int64_t threads) { return int(ceil_div(threads, kWarp) * kWarp); }

// A vector of E elements a thread; the row in as many equal parts as blocks of `most` threads need.
template <class T, class Y, int E, Kind K>
void launch_kind(Queue& queue, const char* name, int64_t B, Backward& p, int most) {
  const int64_t n = ceil_div(p.D, E);
  p.parts = unsigned(ceil_div(n, most));
  launch(queue, name, backward_kernel<T, Y, E, K>, B * p.runs * p.parts, warps_of(ceil_div(n, p.parts)), 0, p);
}

// E: elements of a vector, or 1.
template <class T, class Y, int E> void launch_backward(Queue& queue, const char* name, int64_t B, Backward& p) {
  if constexpr (E > 1) {
    const bool rows_per_token = p.scale_tokens || p.dgate.data;
    if (!p.dh.data && !p.dgate.data) return launch_kind<T, Y, E, Kind::residual>(queue, name, B, p, kMaxPart);
    if (p.dh.data && !rows_per_token && p.D <= E * kMaxWhole) {
      if (p.dx_new.data || p.y.data) return launch_kind<T, Y, E, Kind::both>(queue, name, B, p, kMaxWhole);
      return launch_kind<T, T, E, Kind::norm>(queue, name, B, p, kMaxWhole);
    }
  }
  if (p.dh.data) {
    int warps = 1;
    while (warps < kMaxTeam && p.D > warps * kWarp * 8 * E) warps *= 2;
    const Teams teams(warps, p.S);
    float* means = queue.scratch(B * p.S * 2);
    launch(queue, name, row_means_kernel<T, E>, teams.blocks(B), teams.threads(), 0, p, teams, means);
    p.means = means;
  }
  launch_kind<T, Y, E, Kind::any>(queue, name, B, p, kMaxPart);
}

void backward(Queue& queue, const char* name, const Tensor& dx_new, const Tensor& dh, const Tensor& x, const Tensor& y,
              const Tensor& gate, const Tensor& scale, const Tensor& shift, const Tensor& weight, const Tensor& bias,
              const Tensor& mean, const Tensor& rstd, bool rms, const Tensor& dx, const Tensor& dy, const Tensor& dgate,
              const Tensor& dscale, const Tensor& dshift, const Tensor& dweight, const Tensor& dbias) {
  const int64_t B = x.size[0], S = x.size[1], D = x.size[2];
  const bool scale_tokens = per_token(scale) || per_token(shift);
  const auto rows = [](const Tensor& t, bool wanted) { return wanted ? Rows(t) : Rows(); };
  const Rows sample_dgate = rows(dgate, !per_token(dgate)), sample_dscale = rows(dscale, !per_token(dscale)),
             sample_dshift = rows(dshift, !per_token(dshift));
  Backward p{dx_new, dh, x, y, gate, scale, weight, bias, mean, rstd, dx, dy, rows(dgate, per_token(dgate)),
             rows(dscale, per_token(dscale)), rows(dshift, per_token(dshift))};
  const bool biased = sample_dscale.data && bias, gated = sample_dgate.data;
  const bool wanted[kSums] = {sample_dscale.data || dweight, sample_dshift.data || dbias || biased, gated};
  for (int i = 0; i < kSums; ++i) p.slot[i] = wanted[i] ? p.sums++ : -1;
  p.S = S, p.D = D, p.rms = rms, p.scale_tokens = scale_tokens;
  p.tokens = run_length(S), p.runs = unsigned(ceil_div(S, p.tokens));
  if (p.sums) p.partial = queue.scratch(B * p.runs * p.sums * D);

  if (B > 0 && S > 0 && D > 0) with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int E = kWide<T>;
    bool wide = D % E == 0;
    for (const Tensor* t : {&dx_new, &dh, &x, &y, &gate, &scale, &weight, &bias, &dx, &dy, &dgate, &dscale, &dshift})
      wide = wide && vectors(*t, E);
    with_type(y ? y.dtype : x.dtype, [&](auto y_type) {
      using Y = decltype(y_type);
      // a branch narrower than a float32 residual stream is what autocast gives; other mixtures go element by element
      if constexpr (std::is_same_v<T, Y> || sizeof(T) == 4)
        if (wide) return launch_backward<T, Y, E>(queue, name, B, p);
      launch_backward<T, Y, 1>(queue, name, B, p);
    });
  });

  if (!p.sums) return;
  const bool affine = dweight || dbias;
  float* totals = affine ? queue.scratch(B * 2 * D) : nullptr;
  launch(queue, name, sample_sums_kernel, B * ceil_div(D, kWarp), kGroups * kWarp, 0, p, sample_dgate, sample_dscale,
         sample_dshift, totals);
  if (affine)
    launch(queue, name, batch_sums_kernel, ceil_div(D, kWarp), kGroups * kWarp, 0, totals, rows(scale, !scale_tokens),
           dweight, dbias, B, D);
}

}  // namespace

void adaln_backward(Queue& queue, const Tensor& dx_new, const Tensor& dh, const Tensor& x_new, const Tensor& y,
                    const Tensor& gate, const Tensor& scale, const Tensor& shift, const Tensor& weight,
                    const Tensor& bias, const Tensor& mean, const Tensor& rstd, bool rms, const Tensor& dx,
                    const Tensor& dy, const Tensor& dgate, const Tensor& dscale, const Tensor& dshift,
                    const Tensor& dweight, const Tensor& dbias) {
  backward(queue, "adaln_backward", dx_new, dh, x_new, y, gate, scale, shift, weight, bias, mean, rstd, rms, dx, dy,
           dgate, dscale, dshift, dweight, dbias);
}

// dy = gate * dout, dgate = sum_s dout * y: the same without the norm.
void gate_residual_backward(Queue& queue, const Tensor& dout, const Tensor& y, const Tensor& gate, const Tensor& dy,
                            const Tensor& dgate) {
  const Tensor none;
  backward(queue, "gate_residual_backward", dout, none, dout, y, gate, none, none, none, none, none, none, true, none,
           dy, dgate, none, none, none, none);
}

}  // namespace cuda
}  // namespace difuse
