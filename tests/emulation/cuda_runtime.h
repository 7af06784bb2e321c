// Stands in for CUDA's header where a C++ compiler compiles the kernels, to run on the CPU: what csrc uses of it.
// The threads of a block are fibers on one OS thread, see emulation.cpp; blocks run one after another.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// --- language --------------------------------------------------------------------------------------------------------
#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // with red zones around it
#else
#define __shared__ static thread_local  // these lie together, so that emulation.cpp can poison them before every block
#endif
#define DIFUSE_DYNAMIC_SHARED(name) unsigned char* const name = emulated::dynamic_shared()

// --- vectors, aligned as on GPUs -------------------------------------------------------------------------------------
#define EMULATED_VECTORS(T, name, align2, align4)                                                                    \
  struct name##1 { T x; };                                                                                           \
  struct alignas(align2) name##2 { T x, y; };                                                                        \
  struct name##3 { T x, y, z; };                                                                                     \
  struct alignas(align4) name##4 { T x, y, z, w; };                                                                  \
  inline name##1 make_##name##1(T x) { return {x}; }                                                                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(signed char, char, 2, 4)
EMULATED_VECTORS(unsigned char, uchar, 2, 4)
EMULATED_VECTORS(short, short, 4, 8)
EMULATED_VECTORS(unsigned short, ushort, 4, 8)
EMULATED_VECTORS(int, int, 8, 16)
EMULATED_VECTORS(unsigned, uint, 8, 16)
EMULATED_VECTORS(long long, longlong, 16, 16)
EMULATED_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATED_VECTORS(float, float, 8, 16)
EMULATED_VECTORS(double, double, 16, 16)
#undef EMULATED_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// --- threads ---------------------------------------------------------------------------------------------------------
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulated {

struct Place {  // in the source, for messages and to tell one barrier from another
  const char* file;
  int line;
};
enum class Shuffle { index, up, down, xor_, vote, sync };

// Runs `body` once per thread of the grid. Throws std::runtime_error, with the kernel's name, where hardware would hang
// or leave a result undefined; whatever the threads have written by then stays written.
void run(const char* name, dim3 blocks, dim3 threads, size_t shared, void (*call)(const void*), const void* body);
template <class F> void run(const char* name, dim3 blocks, dim3 threads, size_t shared, const F& body) {
  run(name, blocks, threads, shared, [](const void* f) { (*static_cast<const F*>(f))(); }, &body);
}

unsigned char* dynamic_shared();
void check_global(const void* p);
void block_barrier(Place place);
uint64_t warp_exchange(Shuffle kind, unsigned mask, uint64_t value, int by, int width, Place place);

template <class T> T shuffle(Shuffle kind, unsigned mask, T value, int by, int width, Place place) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_exchange(kind, mask, bits, by, width, place);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulated

#define EMULATED_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(EMULATED_HERE) { emulated::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATED_HERE) {
  emulated::warp_exchange(emulated::Shuffle::sync, mask, 0, 0, 32, {file, line});
}
template <class T> T __shfl_sync(unsigned mask, T v, int lane, int width = 32, EMULATED_HERE) {
  return emulated::shuffle(emulated::Shuffle::index, mask, v, lane, width, {file, line});
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, EMULATED_HERE) {
  return emulated::shuffle(emulated::Shuffle::up, mask, v, int(by), width, {file, line});
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, EMULATED_HERE) {
  return emulated::shuffle(emulated::Shuffle::down, mask, v, int(by), width, {file, line});
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32, EMULATED_HERE) {
  return emulated::shuffle(emulated::Shuffle::xor_, mask, v, by, width, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int yes, EMULATED_HERE) {
  return unsigned(emulated::warp_exchange(emulated::Shuffle::vote, mask, yes != 0, 0, 32, {file, line}));
}
inline int __any_sync(unsigned mask, int yes, EMULATED_HERE) { return __ballot_sync(mask, yes, file, line) != 0; }
inline int __all_sync(unsigned mask, int yes, EMULATED_HERE) { return __ballot_sync(mask, yes, file, line) == mask; }
#undef EMULATED_HERE

// --- memory ----------------------------------------------------------------------------------------------------------
// On GPUs an access to global memory whatever the address: one in shared memory goes astray.
template <class T> void __stwb(T* p, T v) { emulated::check_global(p), *p = v; }

// --- arithmetic ------------------------------------------------------------------------------------------------------
using std::max;
using std::min;
inline unsigned max(unsigned a, int b) { return std::max(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return std::max(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return std::min(a, unsigned(b)); }
inline unsigned min(int a, unsigned b) { return std::min(unsigned(a), b); }
inline long long max(long long a, int b) { return std::max<long long>(a, b); }
inline long long max(int a, long long b) { return std::max<long long>(a, b); }
inline long long min(long long a, int b) { return std::min<long long>(a, b); }
inline long long min(int a, long long b) { return std::min<long long>(a, b); }
inline long max(long a, int b) { return std::max<long>(a, b); }
inline long max(int a, long b) { return std::max<long>(a, b); }
inline long min(long a, int b) { return std::min<long>(a, b); }
inline long min(int a, long b) { return std::min<long>(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }  // the number, if the other is a nan: unlike std's
inline float min(float a, float b) { return fminf(a, b); }

template <class To, class From> To emulated_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float v) { return emulated_bits<unsigned>(v); }
inline int __float_as_int(float v) { return emulated_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }
inline float __int_as_float(int v) { return emulated_bits<float>(v); }
inline float __uint2float_rn(unsigned v) { return float(v); }
inline float __int2float_rn(int v) { return float(v); }
inline int __float2int_rn(float v) { return int(std::nearbyint(v)); }
inline int __float2int_rz(float v) { return int(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __frcp_rn(float v) { return 1 / v; }
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline float __frsqrt_rn(float v) { return float(1 / std::sqrt(double(v))); }
inline float __saturatef(float v) { return v > 0 ? std::fmin(v, 1.f) : 0.f; }
inline float normcdff(float v) { return 0.5f * std::erfc(v * -0.707106781f); }
inline float sinpif(float v) { return float(std::sin(3.14159265358979323846 * std::fmod(double(v), 2.0))); }
inline float cospif(float v) { return float(std::cos(3.14159265358979323846 * std::fmod(double(v), 2.0))); }
inline void sincospif(float v, float* s, float* c) { *s = sinpif(v), *c = cospif(v); }
// The fast ones err where hardware's do: an argument rounded in base 2, a quotient lost above 2^126.
inline float __expf(float v) { return std::exp2(v * 1.442695041f); }
inline float __exp10f(float v) { return std::exp2(v * 3.321928095f); }
inline float __logf(float v) { return std::log2(v) * 0.6931471806f; }
inline float __log2f(float v) { return std::log2(v); }
inline float __powf(float v, float e) { return std::exp2(e * std::log2(v)); }
inline float __sinf(float v) { return std::sin(v); }
inline float __cosf(float v) { return std::cos(v); }
inline void __sincosf(float v, float* s, float* c) { *s = std::sin(v), *c = std::cos(v); }
inline float __fdividef(float a, float b) {
  const float size = std::fabs(b);
  return size > 0x1p126f && size <= 3.402823466e38f ? a * 0.f : a / b;
}

// --- host ------------------------------------------------------------------------------------------------------------
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
};
using cudaStream_t = struct CUstream_st*;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) { return *device = 0, cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaError";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "an emulated error";
}
