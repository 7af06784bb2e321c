// What the forward and the backward pass of qk_norm_rope on GPUs share: where heads lie, which thread holds what of
// them, the rotation, sums over a head or a token.
//
// Wide kernels: a group of `lanes` threads, a power of two, holds one head, each thread two 16-byte vectors of it.
// These are what the rotation pairs where it pairs halves; neighbours lie in one vector: either way a pair is in one
// thread. A thread takes several heads of one token, `slots` apart: their loads are in flight together, and angles are
// read once, unless every head has its own.
// Plain kernels: a block walks over a head (norm over the head) or a token (norm over the token), one element a
// thread, and reads again what it needs again. They take what the wide ones do not: any D, any alignment.
#pragma once
#include "../common/cuda.h"

namespace difuse {
namespace cuda {
namespace qk {

enum Rope { kNone, kInterleaved, kHalf };

constexpr int kGroupThreads = 128;                 // of a block whose groups are independent: norm over the head
constexpr int kTokenThreads = 512;                 // at most, of a block that holds a token: norm over the token
constexpr int kPlainHead = 32, kPlainToken = 256;  // of a plain kernel's block

inline bool given(const Tensor& t) { return t.ndim != 0; }  // an empty tensor has no data either
inline bool wide_vector(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

// [B,S,H,D], the last stride is 1.
struct Heads {
  char* data = nullptr;
  int64_t b, s, h;
  Heads() = default;
  explicit Heads(const Tensor& t) : data(t.data), b(t.stride[0]), s(t.stride[1]), h(t.stride[2]) {}
  template <class T> __device__ T* at(int64_t batch, int64_t token, int64_t head) const {
    return reinterpret_cast<T*>(data) + batch * b + token * s + head * h;
  }
};

// A weight or bias, or none.
struct Parameter {
  const char* data = nullptr;
  DType dtype = DType::f32;
  bool wide = false;
  Parameter() = default;
  explicit Parameter(const Tensor& t) : data(t.data), dtype(t.dtype), wide(wide_vector(t)) {}
};

// cos or sin.
struct Table {
  const char* data = nullptr;
  DType dtype = DType::f32;
  bool wide = false;
  int64_t b = 0, s = 0, h = 0, p = 1;
  explicit Table(const Tensor& t) {
    if (!given(t)) return;
    data = t.data, dtype = t.dtype;
    b = t.ndim > 2 ? t.stride[0] : 0, s = t.stride[t.ndim > 2], h = t.ndim == 4 ? t.stride[2] : 0;
    p = t.stride[t.ndim - 1];
    wide = p == 1 && wide_rows(t);
  }
  __device__ int64_t row(int64_t batch, int64_t token, int64_t head) const { return batch * b + token * s + head * h; }
};

struct Angles {
  Table cos, sin;
  Rope rope = kNone;
  int pairs = 0;
  bool per_head;
  float sign;  // -1 turns back
  Angles(const Tensor& cos, const Tensor& sin, bool interleaved, float sign)
      : cos(cos), sin(sin), per_head(cos.ndim == 4), sign(sign) {
    pairs = given(cos) ? int(cos.size[cos.ndim - 1]) : 0;
    if (pairs) rope = interleaved ? kInterleaved : kHalf;
  }
};

// How wide kernels share out a head of D. Without `lanes` they cannot.
struct Layout {
  int D, half = 0, shift = 0, lanes = 0;  // vectors of a lane's first kind; lanes = 2 ^ shift
  Layout(int64_t D, int wide, const Angles& angles) : D(int(D)) {
    if (D % wide || D > 2 * kWarp * wide || D == 0) return;
    if (angles.rope == kHalf && (D % (2 * wide) || angles.pairs % wide)) return;
    half = int((D / wide + 1) / 2);
    while (1 << shift < half) ++shift;
    lanes = 1 << shift;
  }
};

// The rows of one tensor, and how threads share them out.
struct Rows {
  int64_t tokens = 0;
  int heads = 0, slots = 0, each = 0;  // a thread takes heads slot, slot + slots, ...: `each` of them
  unsigned blocks = 0;                 // of a sample
  float share = 0;                     // 1 / elements under one norm
  Rows() = default;
  Rows(const Tensor& t, bool full, int most)
      : tokens(t.size[1]), heads(int(t.size[2])), slots(int(ceil_div(heads, most))),
        each(slots ? int(ceil_div(heads, slots)) : 0), share(1.f / float((full ? heads : 1) * t.size[3])) {}
  bool fits() const { return tokens * slots <= 0x7fffffff; }
};

// Threads of a wide block: kGroupThreads, or as many as hold a token of q or k. 0 where these are more than `limit`.
inline int wide_threads(const Rows* rows, bool full, const Layout& layout, int limit) {
  if (!full) return layout.lanes ? kGroupThreads : 0;
  const int64_t slots = rows[0].slots < rows[1].slots ? rows[1].slots : rows[0].slots;
  const int64_t threads = ceil_div(slots * layout.lanes, kWarp) * kWarp;
  return threads <= limit ? int(threads) : 0;
}

// The two vectors of a lane.
struct Place {
  int first, second;  // elements
  bool first_there, second_there;
  template <class T> __device__ static Place of(const Layout& layout, const Angles& angles) {
    const int lane = int(threadIdx.x) & (layout.lanes - 1), at = lane * kWide<T>;
    Place p{at, at + layout.half * kWide<T>, lane < layout.half, true};
    if (angles.rope == kHalf)  // i and i + P; beyond P two of the rest
      at < angles.pairs ? p.second = at + angles.pairs : p.first = at + angles.pairs;
    p.second_there = p.first_there && p.second < layout.D;
    return p;
  }
};

// --- a vector and its elements ---------------------------------------------------------------------------------------
template <class T> __device__ __forceinline__ uint4 fetch(const T* p, bool there) {
  return there ? *reinterpret_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
}

template <class T> __device__ __forceinline__ void unpack(float (&to)[kWide<T>], const uint4& word) {
  T values[kWide<T>];
  memcpy(values, &word, 16);
#pragma unroll
  for (int i = 0; i < kWide<T>; ++i) to[i] = to_float(values[i]);
}

__device__ __forceinline__ float element(const char* row, DType dtype, int64_t at) {
  float value[1];
  load(value, row, dtype, at);
  return value[0];
}

// N elements of a parameter, or `absent`.
template <int N> __device__ void parameter(float (&to)[N], const Parameter& p, int64_t at, bool there, float absent) {
  if (!p.data || !there) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = absent;
  } else if (p.wide) {
    load(to, p.data, p.dtype, at);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = element(p.data, p.dtype, at + i);
  }
}

// --- the rotation ----------------------------------------------------------------------------------------------------
template <int N, class T>
__device__ __forceinline__ void gather(float (&to)[N], const T* p, int64_t step, int there, float beyond) {
#pragma unroll
  for (int i = 0; i < N; ++i, p += step) to[i] = i < there ? to_float(*p) : beyond;
}

// Elements [at, at + N) of a row of P; `beyond` from P on.
template <int N> __device__ void angle(float (&to)[N], const Table& t, int64_t row, int at, int P, float beyond) {
  const int64_t from = row + at * t.p;
  if (t.wide && at + N <= P) load(to, t.data, t.dtype, from);
  else if (t.dtype == DType::f32) gather(to, reinterpret_cast<const float*>(t.data) + from, t.p, P - at, beyond);
  else if (t.dtype == DType::bf16) gather(to, reinterpret_cast<const bf16*>(t.data) + from, t.p, P - at, beyond);
  else gather(to, reinterpret_cast<const f16*>(t.data) + from, t.p, P - at, beyond);
}

// The W angles of a lane's pairs: neighbours of the first vector, then of the second, or the pairs across both.
template <int W>
__device__ void lane_angles(float (&to)[W], const Table& t, int64_t row, const Angles& angles, const Place& place,
                            float beyond) {
  if (angles.rope == kHalf) {
    angle(to, t, row, place.first, angles.pairs, beyond);
    return;
  }
  float part[2][W / 2];
  angle(part[0], t, row, place.first / 2, angles.pairs, beyond);
  angle(part[1], t, row, place.second / 2, angles.pairs, beyond);
#pragma unroll
  for (int i = 0; i < W; ++i) to[i] = part[i / (W / 2)][i % (W / 2)];
}
template <int W>
__device__ void lane_angles(float (&cos)[W], float (&sin)[W], const Angles& angles, int64_t batch, int64_t token,
                            int64_t head, const Place& place) {
  lane_angles(cos, angles.cos, angles.cos.row(batch, token, head), angles, place, 1);
  lane_angles(sin, angles.sin, angles.sin.row(batch, token, head), angles, place, 0);
#pragma unroll
  for (int i = 0; i < W; ++i) sin[i] *= angles.sign;
}

__device__ __forceinline__ void turn(float& first, float& second, float cos, float sin) {
  const float a = first, b = second;
  first = a * cos - b * sin;
  second = b * cos + a * sin;
}

template <int W>
__device__ __forceinline__ void turn(float (&v)[2][W], const float (&cos)[W], const float (&sin)[W], Rope rope) {
  if (rope == kHalf) {
#pragma unroll
    for (int i = 0; i < W; ++i) turn(v[0][i], v[1][i], cos[i], sin[i]);
  } else if (rope == kInterleaved) {
#pragma unroll
    for (int i = 0; i < W; ++i) turn(v[2 * i / W][2 * i % W], v[2 * i / W][2 * i % W + 1], cos[i], sin[i]);
  }
}

// Element i of a turned head whose elements are value(i).
template <class F>
__device__ float turned(const Angles& angles, int64_t batch, int64_t token, int64_t head, int i, F value) {
  const int P = angles.pairs;
  if (i >= 2 * P) return value(i);
  const bool half = angles.rope == kHalf, second = half ? i >= P : i % 2;
  const int pair = half ? i - second * P : i / 2, other = half ? (second ? i - P : i + P) : i ^ 1;
  const Table &c = angles.cos, &s = angles.sin;
  const float cos = element(c.data, c.dtype, c.row(batch, token, head) + pair * c.p);
  const float sin = angles.sign * element(s.data, s.dtype, s.row(batch, token, head) + pair * s.p);
  return value(i) * cos + value(other) * (second ? sin : -sin);
}

// --- sums, each in a fixed order -------------------------------------------------------------------------------------
// N sums over a block of at most 1024 threads, the totals in every thread; shared: [N][kWarp].
template <int N> __device__ void block_sum(float (&v)[N], float* shared) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = lanes_sum(v[n]);
  __syncthreads();  // the last sums have been read
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (lane == 0) shared[n * kWarp + warp] = v[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = lanes_sum(lane < warps ? shared[n * kWarp + lane] : 0.f);
}

// What U heads of a thread add to their sums, turned into these sums: of a group each, or of all heads of the block.
template <bool full, int U> __device__ void total(float (&v)[U], int lanes, float* shared) {
  if constexpr (full) {
    float all[1] = {0};
#pragma unroll
    for (int u = 0; u < U; ++u) all[0] += v[u];
    block_sum(all, shared);
#pragma unroll
    for (int u = 0; u < U; ++u) v[u] = all[0];
  } else {
    for (int w = lanes / 2; w > 0; w /= 2) {
#pragma unroll
      for (int u = 0; u < U; ++u) v[u] += __shfl_xor_sync(kAll, v[u], w);
    }
  }
}

// Mean (0 for RMSNorm) and 1 / deviation of U heads in registers; 0 for heads that are not `there`.
template <class T, bool full, int U>
__device__ void statistics(const uint4 (&x)[U][2], const bool (&there)[U], const Place& place, const Layout& layout,
                           bool layer, float share, float eps, float* shared, float (&mean)[U], float (&rstd)[U]) {
  constexpr int W = kWide<T>;
  float v[W];
#pragma unroll
  for (int u = 0; u < U; ++u) mean[u] = 0;
  if (layer) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        unpack<T>(v, x[u][part]);
#pragma unroll
        for (int i = 0; i < W; ++i) mean[u] += v[i];
      }
    }
    total<full>(mean, layout.lanes, shared);
#pragma unroll
    for (int u = 0; u < U; ++u) mean[u] *= share;
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    float squares[2] = {0, 0};
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      unpack<T>(v, x[u][part]);
#pragma unroll
      for (int i = 0; i < W; ++i) squares[part] += (v[i] - mean[u]) * (v[i] - mean[u]);
    }
    rstd[u] = (there[u] && place.first_there ? squares[0] : 0) + (there[u] && place.second_there ? squares[1] : 0);
  }
  total<full>(rstd, layout.lanes, shared);
#pragma unroll
  for (int u = 0; u < U; ++u) rstd[u] = there[u] ? rsqrtf(rstd[u] * share + eps) : 0;
}

// The same of n elements value(i) that a block walks over.
template <class F>
__device__ void statistics(int64_t n, bool layer, float share, float eps, float* shared, float& mean, float& rstd,
                           F value) {
  float sum[1] = {0};
  if (layer) {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum[0] += value(i);
    block_sum(sum, shared);
  }
  mean = sum[0] * share;
  sum[0] = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum[0] += (value(i) - mean) * (value(i) - mean);
  block_sum(sum, shared);
  rstd = rsqrtf(sum[0] * share + eps);
}

}  // namespace qk
}  // namespace cuda
}  // namespace difuse
