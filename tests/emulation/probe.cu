// Kernels that test the emulation itself, right ones and wrong ones; see tests/test_emulation.py.
#include <stdexcept>
#include <string>

#include "common/cuda.h"

using namespace difuse;
using namespace difuse::cuda;

namespace {

__device__ int thread() { return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)); }

// --- right -----------------------------------------------------------------------------------------------------------
__global__ void numbers_kernel(int* out, int threads) {
  int* mine = out + (int64_t(blockIdx.x) * threads + thread()) * 6;
  mine[0] = int(threadIdx.x), mine[1] = int(threadIdx.y), mine[2] = int(threadIdx.z);
  mine[3] = int(blockIdx.x), mine[4] = int(blockDim.x), mine[5] = int(gridDim.x);
}

// Sums over a block in shared memory: each round halves the number of threads at work, all of them meet at the barrier.
template <class T> __global__ void __launch_bounds__(1024) sum_kernel(const T* in, T* out) {
  __shared__ T part[1024];
  part[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) part[threadIdx.x] += part[threadIdx.x + n];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

__global__ void turn_kernel(const float* in, float* out) {  // numbers backwards, through dynamic shared memory
  DIFUSE_DYNAMIC_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

template <class T> __global__ void shuffle_kernel(const T* in, T* out, int kind, int by, int width) {
  const T v = in[threadIdx.x];
  out[threadIdx.x] = kind == 0   ? __shfl_sync(kAll, v, by, width)
                     : kind == 1 ? __shfl_up_sync(kAll, v, by, width)
                     : kind == 2 ? __shfl_down_sync(kAll, v, by, width)
                                 : __shfl_xor_sync(kAll, v, by, width);
}

__global__ void votes_kernel(const int* in, int* out) {
  const int yes = in[threadIdx.x];
  out[threadIdx.x] = int(__ballot_sync(kAll, yes));
  out[blockDim.x + threadIdx.x] = 2 * __any_sync(kAll, yes) + __all_sync(kAll, yes);
}

// The two halves of a warp go different ways, each with its own mask.
__global__ void halves_kernel(const float* in, float* out) {
  float v = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    for (int w = 8; w > 0; w /= 2) v += __shfl_xor_sync(0x0000ffffu, v, w);
  } else {
    for (int w = 1; w < 16; w *= 2) v = fmaxf(v, __shfl_xor_sync(0xffff0000u, v, w));
  }
  __syncwarp();
  out[threadIdx.x] = v;
}

__global__ void sums_kernel(const float* in, float* out) { out[threadIdx.x] = lanes_sum(in[threadIdx.x]); }

template <class T> __global__ void round_kernel(const float* in, T* out) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  from_float(out[i], in[i]);
}
template <class T> __global__ void widen_kernel(const T* in, float* out) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  out[i] = to_float(in[i]);
}
template <class T> __global__ void copy_kernel(const T* in, T* out, int shift) {  // 16 bytes at a time
  float values[kWide<T>];
  load(values, in + threadIdx.x * kWide<T> + shift);
  store(out + threadIdx.x * kWide<T>, values);
}

// --- wrong -----------------------------------------------------------------------------------------------------------
__global__ void early_return_kernel(int last) {  // before a barrier
  if (int(threadIdx.x) >= last) return;
  __syncthreads();
}
__global__ void two_barriers_kernel(int first) {
  if (int(threadIdx.x) < first) __syncthreads();
  else
    __syncthreads();
}
__global__ void barrier_or_shuffle_kernel() {
  if (threadIdx.x < 16) __syncthreads();
  else lanes_sum(1.f);
}
__global__ void gone_lanes_kernel(float* out) {
  if (threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = lanes_sum(1.f);
}
__global__ void short_warp_kernel(float* out) { out[threadIdx.x] = lanes_sum(1.f); }
__global__ void outside_mask_kernel(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.f, 20);
}
__global__ void not_in_mask_kernel(float* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.f, 0); }
__global__ void odd_width_kernel(float* out) { out[threadIdx.x] = __shfl_sync(kAll, 1.f, 0, 12); }
__global__ void throwing_kernel(int thread) {
  if (int(threadIdx.x) == thread) throw std::logic_error("thrown by the kernel");
  __syncthreads();
}
__global__ void beyond_shared_kernel(int at) {
  DIFUSE_DYNAMIC_SHARED(memory);
  memory[at] = 1;
}
__global__ void store_to_shared_kernel() {
  alignas(16) __shared__ float values[4 * 32];
  const float four[4] = {1, 2, 3, 4};
  store(values + 4 * threadIdx.x, four);
}
__global__ void store_to_dynamic_kernel() {
  DIFUSE_DYNAMIC_SHARED(memory);
  const float four[4] = {1, 2, 3, 4};
  store(reinterpret_cast<float*>(memory) + 4 * threadIdx.x, four);
}
__global__ void unwritten_kernel(float* out, int which) {  // reads what nobody wrote
  __shared__ float values[64];
  DIFUSE_DYNAMIC_SHARED(memory);
  const float v = which ? reinterpret_cast<float*>(memory)[threadIdx.x] : values[threadIdx.x];
  out[threadIdx.x] = v;
  if (which) reinterpret_cast<float*>(memory)[threadIdx.x] = 1;
  else values[threadIdx.x] = 1;
}
__global__ void missing_barrier_kernel(float* out, int towards) {  // reads what a neighbour has just written, perhaps
  __shared__ float values[1024];
  values[threadIdx.x] = 1;
  out[threadIdx.x] = values[(threadIdx.x + blockDim.x + towards) % blockDim.x];
}
__global__ void missing_second_barrier_kernel(float* out) {  // overwrites what another warp has not read yet
  __shared__ float total;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) total = float(round);
    __syncthreads();
    out[round * blockDim.x + threadIdx.x] = total;
  }
}
__global__ void last_thread_kernel(int* out) { out[0] = int(blockIdx.x), out[1] = int(threadIdx.x); }
__global__ void outside_kernel(float* p, int read_at, int write_at) { p[write_at] = p[read_at]; }

struct NoScratch final : Queue {
  NoScratch() { device = 0, stream = nullptr; }
  float* scratch(int64_t) override { return nullptr; }
};

std::string message;

template <class F> const char* guarded(F body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

template <class... P, class... A>
void start(const char* name, void (*kernel)(P...), int64_t blocks, int threads, size_t shared, A... arguments) {
  NoScratch queue;
  launch(queue, name, kernel, blocks, threads, shared, arguments...);
}

}  // namespace

// Called through ctypes; what they return is an error's text, or nothing.
#define PROBE(name, arguments, ...)                                                                                  \
  extern "C" __attribute__((visibility("default"))) const char* name arguments {                                     \
    return guarded([&] { __VA_ARGS__; });                                                                            \
  }

PROBE(numbers, (int* out, int blocks, int x, int y, int z),
      emulated::run("numbers", dim3(blocks), dim3(x, y, z), 0, [&] { numbers_kernel(out, x * y * z); }))
PROBE(sum, (const float* in, float* out, int blocks, int threads),
      start("sum", sum_kernel<float>, blocks, threads, 0, in, out))
PROBE(sum_int, (const int* in, int* out, int blocks, int threads),
      start("sum_int", sum_kernel<int>, blocks, threads, 0, in, out))
PROBE(turn, (const float* in, float* out, int threads),
      start("turn", turn_kernel, 1, threads, threads * sizeof(float), in, out))
PROBE(shuffle, (const float* in, float* out, int threads, int kind, int by, int width),
      start("shuffle", shuffle_kernel<float>, 1, threads, 0, in, out, kind, by, width))
PROBE(shuffle_long, (const int64_t* in, int64_t* out, int threads, int kind, int by, int width),
      start("shuffle", shuffle_kernel<int64_t>, 1, threads, 0, in, out, kind, by, width))
PROBE(votes, (const int* in, int* out, int threads), start("votes", votes_kernel, 1, threads, 0, in, out))
PROBE(halves, (const float* in, float* out, int threads), start("halves", halves_kernel, 1, threads, 0, in, out))
PROBE(sums, (const float* in, float* out, int threads), start("sums", sums_kernel, 1, threads, 0, in, out))
PROBE(to_bfloat16, (const float* in, bf16* out, int blocks), start("r", round_kernel<bf16>, blocks, 256, 0, in, out))
PROBE(to_float16, (const float* in, f16* out, int blocks), start("r", round_kernel<f16>, blocks, 256, 0, in, out))
PROBE(from_bfloat16, (const bf16* in, float* out, int blocks), start("w", widen_kernel<bf16>, blocks, 256, 0, in, out))
PROBE(from_float16, (const f16* in, float* out, int blocks), start("w", widen_kernel<f16>, blocks, 256, 0, in, out))

PROBE(early_return, (int threads, int last), start("early_return", early_return_kernel, 2, threads, 0, last))
PROBE(two_barriers, (int first), start("two_barriers", two_barriers_kernel, 1, 64, 0, first))
PROBE(barrier_or_shuffle, (), start("barrier_or_shuffle", barrier_or_shuffle_kernel, 1, 32, 0))
PROBE(gone_lanes, (float* out), start("gone_lanes", gone_lanes_kernel, 1, 64, 0, out))
PROBE(short_warp, (float* out), start("short_warp", short_warp_kernel, 1, 48, 0, out))
PROBE(outside_mask, (float* out), start("outside_mask", outside_mask_kernel, 1, 32, 0, out))
PROBE(not_in_mask, (float* out), start("not_in_mask", not_in_mask_kernel, 1, 32, 0, out))
PROBE(odd_width, (float* out), start("odd_width", odd_width_kernel, 1, 32, 0, out))
PROBE(throwing, (int thread), start("throwing", throwing_kernel, 1, 64, 0, thread))
PROBE(beyond_shared, (int bytes, int at), start("beyond_shared", beyond_shared_kernel, 1, 1, bytes, at))
PROBE(unwritten, (float* out, int which), start("unwritten", unwritten_kernel, 2, 64, 256, out, which))
PROBE(missing_barrier, (float* out, int threads, int towards),
      start("missing_barrier", missing_barrier_kernel, 1, threads, 0, out, towards))
PROBE(missing_second_barrier, (float* out),
      start("missing_second_barrier", missing_second_barrier_kernel, 1, 64, 0, out))
PROBE(store_to_shared, (), start("store_to_shared", store_to_shared_kernel, 1, 32, 0))
PROBE(store_to_dynamic, (), start("store_to_dynamic", store_to_dynamic_kernel, 1, 32, 32 * 16))
PROBE(refusal, (int error, int device, int stream), {
  struct Other final : Queue {
    float* scratch(int64_t) override { return nullptr; }
  } queue;
  queue.device = device, queue.stream = reinterpret_cast<void*>(int64_t(stream));
  refuse(cudaError_t(error), "probe", queue);
})
PROBE(last_thread, (int* out, int blocks, int threads),
      start("last_thread", last_thread_kernel, blocks, threads, 0, out))
PROBE(outside, (float* p, int read_at, int write_at), start("outside", outside_kernel, 1, 1, 0, p, read_at, write_at))
PROBE(copy, (const bf16* in, bf16* out, int threads, int shift),
      start("copy", copy_kernel<bf16>, 1, threads, 0, in, out, shift))
