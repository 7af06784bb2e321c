// What the CUDA kernels share: types, the launch, 16-byte accesses, reductions. Also compiled by g++ with the headers
// of tests/emulation, which run a grid on the CPU; `launch` is the one place where the two differ.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../ops.h"

#ifndef DIFUSE_DYNAMIC_SHARED  // the emulation has its own; at most 48 KB, as the launch was told
#define DIFUSE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace difuse {
namespace cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;                     // every lane of a warp
template <class T> constexpr int kWide = 16 / sizeof(T);   // elements of one 16-byte access

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t element_size(DType dtype) {
  return dtype == DType::f32 || dtype == DType::i32 ? 4 : dtype == DType::u8 ? 1 : 2;
}

// Calls body(T{}) with the element type of `dtype`, on the host.
template <class F> void with_type(DType dtype, F body) {
  if (dtype == DType::f32) body(float{});
  else if (dtype == DType::bf16) body(bf16{});
  else body(f16{});
}

// Whether every row of `t` may be accessed 16 bytes at a time: its address and all its strides but the last allow it.
inline bool wide_rows(const Tensor& t) {
  const int64_t size = element_size(t.dtype);
  if (reinterpret_cast<uintptr_t>(t.data) % 16) return false;
  for (int i = 0; i + 1 < t.ndim; ++i)  // of one sample too: alone it takes the path that it takes among others
    if (t.stride[i] * size % 16) return false;
  return true;
}

// --- launching -------------------------------------------------------------------------------------------------------
[[noreturn]] void refuse(cudaError_t error, const char* kernel, const Queue& queue);  // common/device_cuda.cu

inline void check(cudaError_t error, const char* kernel, const Queue& queue) {
  if (error != cudaSuccess) refuse(error, kernel, queue);
}

// Makes the queue's device the current one for the scope: a launch goes to the current device.
class OnDevice {
 public:
  OnDevice(const char* kernel, const Queue& queue) {
    check(cudaGetDevice(&before_), kernel, queue);
    if (before_ == queue.device) before_ = -1;
    else check(cudaSetDevice(queue.device), kernel, queue);
  }
  ~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }

 private:
  int before_ = -1;
};

// kernel<<<blocks, threads, shared>>>(arguments...) in the queue; an error is thrown, under `name`. Nothing is launched
// where there is no block. `shared`: bytes of dynamic shared memory, at most 48 KB.
template <class... P, class... A>
void launch(Queue& queue, const char* name, void (*kernel)(P...), int64_t blocks, int threads, size_t shared,
            const A&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) refuse(cudaErrorInvalidConfiguration, name, queue);
#ifdef DIFUSE_EMULATED
  emulated::run(name, dim3(unsigned(blocks)), dim3(threads), shared, [&] { kernel(arguments...); });
#else
  const OnDevice guard(name, queue);
  std::tuple<std::decay_t<P>...> values{arguments...};
  std::apply([&](auto&... value) {
    void* pointers[] = {&value..., nullptr};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(threads), pointers,
                           shared, static_cast<cudaStream_t>(queue.stream)), name, queue);
  }, values);
#endif
}

// --- memory ----------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }

__device__ __forceinline__ void from_float(float& to, float v) { to = v; }
__device__ __forceinline__ void from_float(bf16& to, float v) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void from_float(f16& to, float v) { to = __float2half_rn(v); }

// N elements at p as float32, 16 bytes at a time where N fills them: p is then aligned to 16 bytes.
template <int N, class T> __device__ __forceinline__ void load(float (&to)[N], const T* __restrict__ p) {
  if constexpr (N * sizeof(T) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += kWide<T>) {
      const uint4 word = *reinterpret_cast<const uint4*>(p + i);
      T values[kWide<T>];
      memcpy(values, &word, 16);
#pragma unroll
      for (int j = 0; j < kWide<T>; ++j) to[i + j] = to_float(values[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(p[i]);
  }
}

// The same for an element type known at run time, the same in all threads; `at` counts elements.
template <int N> __device__ __forceinline__ void load(float (&to)[N], const char* row, DType dtype, int64_t at) {
  if (dtype == DType::f32) load(to, reinterpret_cast<const float*>(row) + at);
  else if (dtype == DType::bf16) load(to, reinterpret_cast<const bf16*>(row) + at);
  else load(to, reinterpret_cast<const f16*>(row) + at);
}

// N elements rounded to T and written to p, in global memory; aligned as for `load`.
template <int N, class T> __device__ __forceinline__ void store(T* p, const float (&from)[N]) {
  if constexpr (N * sizeof(T) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += kWide<T>) {
      T values[kWide<T>];
#pragma unroll
      for (int j = 0; j < kWide<T>; ++j) from_float(values[j], from[i + j]);
      uint4 word;
      memcpy(&word, values, 16);
      __stwb(reinterpret_cast<uint4*>(p + i), word);  // an assignment may become four stores
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) from_float(p[i], from[i]);
  }
}

template <int N> __device__ __forceinline__ void store(char* row, DType dtype, int64_t at, const float (&from)[N]) {
  if (dtype == DType::f32) store(reinterpret_cast<float*>(row) + at, from);
  else if (dtype == DType::bf16) store(reinterpret_cast<bf16*>(row) + at, from);
  else store(reinterpret_cast<f16*>(row) + at, from);
}

// a / b of numbers that are not negative; 64-bit divisions are slow.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}

// --- reductions: a fixed tree, the same bits every time, the total in every lane ------------------------------------
// Over groups of W neighbouring lanes, W a power of two; every lane of the warp takes part.
template <int W = kWarp> __device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
  for (int w = W / 2; w > 0; w /= 2) v += __shfl_xor_sync(kAll, v, w);
  return v;
}

}  // namespace cuda
}  // namespace difuse
