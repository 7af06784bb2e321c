// What adaln's CUDA kernels share: operands, vectors as they lie in memory, sums over the warps of a row.
#pragma once
#include "../common/cuda.h"

namespace difuse {
namespace cuda {

// An operand of a kernel: [B,S,D], [B,D] (one row for all tokens of a sample) or [D] (one row for all).
struct Rows {
  char* data = nullptr;
  int64_t b = 0, s = 0;  // strides, in elements
  DType dtype = DType::f32;

  Rows() = default;
  Rows(const Tensor& t)
      : data(t.data), b(t.ndim > 1 ? t.stride[0] : 0), s(t.ndim == 3 ? t.stride[1] : 0), dtype(t.dtype) {}

  __device__ bool given() const { return data != nullptr; }
  template <class T> __device__ T* row(int64_t sample, int64_t token) const {
    return reinterpret_cast<T*>(data) + sample * b + token * s;
  }
  __device__ char* bytes(int64_t sample, int64_t token) const {
    return data + (sample * b + token * s) * (dtype == DType::f32 ? 4 : 2);
  }
};

inline bool per_token(const Tensor& t) { return t.ndim == 3; }

// Whether rows of `t`, if it is given, may be accessed E elements at a time, 16 bytes at most.
inline bool vectors(const Tensor& t, int E) {
  const int64_t size = element_size(t.dtype), bytes = E * size < 16 ? E * size : 16;
  if (!t) return true;
  if (reinterpret_cast<uintptr_t>(t.data) % bytes) return false;
  for (int i = 0; i + 1 < t.ndim; ++i)  // of one sample too: alone it takes the path that it takes among others
    if (t.stride[i] * size % bytes) return false;
  return true;
}

// Calls body(T{}) with the element type of `dtype`, the same in all threads.
template <class F> __device__ __forceinline__ void typed(DType dtype, F body) {
  if (dtype == DType::f32) body(float{});
  else if (dtype == DType::bf16) body(bf16{});
  else body(f16{});
}

// The same for modulations beside a stream of T. Halves of the other kind than T are left to the kernels for any shape.
template <class T, class F> __device__ __forceinline__ void typed_beside(DType dtype, F body) {
  if (dtype == DType::f32) body(float{});
  else if constexpr (sizeof(T) == 2) body(T{});
  else if (dtype == DType::bf16) body(bf16{});
  else body(f16{});
}
template <class T> bool beside(const Tensor& t) {
  constexpr DType type = std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
  return sizeof(T) == 4 || !t || t.dtype == DType::f32 || t.dtype == type;
}

template <int BYTES> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

// E neighbouring elements of T as they lie in memory: loads that nobody has waited for yet stay as narrow as they came.
template <class T, int E> struct Raw {
  static constexpr int kWords = E * sizeof(T) > 16 ? E * sizeof(T) / 16 : 1;
  using W = typename Word<E * sizeof(T) / kWords>::type;
  W words[kWords];

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const W*>(p)[i];
  }
  __device__ __forceinline__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<W*>(p)[i] = words[i];
  }
  __device__ __forceinline__ void get(float (&to)[E]) const {
    T values[E];
    memcpy(values, words, sizeof(words));
#pragma unroll
    for (int j = 0; j < E; ++j) to[j] = to_float(values[j]);
  }
  __device__ __forceinline__ void set(const float (&from)[E]) {
    T values[E];
#pragma unroll
    for (int j = 0; j < E; ++j) from_float(values[j], from[j]);
    memcpy(words, values, sizeof(words));
  }
};

// E elements of a row from `at` on, in or out, dtype known at run time.
template <int E>
__device__ __forceinline__ void read(float (&to)[E], const Rows& rows, int64_t b, int64_t s, int64_t at) {
  typed(rows.dtype, [&](auto type) {
    Raw<decltype(type), E> raw;
    raw.load(rows.row<decltype(type)>(b, s) + at);
    raw.get(to);
  });
}
template <int E>
__device__ __forceinline__ void write(const Rows& rows, int64_t b, int64_t s, int64_t at, const float (&from)[E]) {
  typed(rows.dtype, [&](auto type) {
    Raw<decltype(type), E> raw;
    raw.set(from);
    raw.store(rows.row<decltype(type)>(b, s) + at);
  });
}
__device__ __forceinline__ float element(const Rows& rows, int64_t b, int64_t s, int64_t at) {
  float value[1];
  read(value, rows, b, s, at);
  return value[0];
}

template <int E> __device__ __forceinline__ float sum(const float (&v)[E]) {  // in pairs: a short chain
  float pairs[(E + 1) / 2];
#pragma unroll
  for (int j = 0; j < E / 2; ++j) pairs[j] = v[2 * j] + v[2 * j + 1];
  if constexpr (E == 1) return v[0];
  else if constexpr (E == 2) return pairs[0];
  else return sum(pairs);
}

// --- teams: 1, 2, 4, .. kMaxTeam warps to a row ----------------------------------------------------------------------
// A single warp needs no barrier, and then a block takes kTeams rows; larger teams are a block each.
constexpr int kMaxTeam = 16, kTeams = 4;

struct Teams {
  int warps;
  unsigned spans;  // blocks to a sample

  Teams(int warps_, int64_t S) : warps(warps_), spans(unsigned(ceil_div(S, rows()))) {}
  int rows() const { return warps == 1 ? kTeams : 1; }
  int threads() const { return warps * rows() * kWarp; }
  int64_t blocks(int64_t B) const { return B * spans; }

  __device__ int size() const { return warps * kWarp; }
  __device__ int thread() const { return threadIdx.x & (size() - 1); }
  __device__ int64_t sample() const { return blockIdx.x / spans; }
  __device__ int64_t token() const {
    const unsigned span = blockIdx.x % spans;
    return warps == 1 ? int64_t(span) * kTeams + threadIdx.x / kWarp : span;
  }
  // The sum over the team, in every thread; `part` is not used for anything else.
  __device__ __forceinline__ float sum(float v, float (&part)[kMaxTeam]) const {
    v = lanes_sum(v);
    if (warps == 1) return v;
    if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = v;
    __syncthreads();
    const int lane = threadIdx.x % kMaxTeam;
    return lanes_sum<kMaxTeam>(lane < warps ? part[lane] : 0.f);
  }
};

}  // namespace cuda
}  // namespace difuse
