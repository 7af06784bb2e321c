// sampler_step on GPUs, contract in kernels/difuse_kernels/sampler_step/sampler_step.py.
//
//   out_i = sum_j C[i,j] * x_j
//
// Dimensions that are dense in every input are merged; the samples stay apart where coefficients or noise are theirs. A
// block does one run of elements of a sample (of everything, if all samples share C), and reads C and the seeds itself:
// a captured graph replays with whatever they then hold. Wide: a thread does 8 elements of one dense run by 16-byte
// accesses, all inputs' loads under way at once. Otherwise: one element, found by its index in every dimension.
// A step with guidance reads x and two model outputs and writes x, 8 bytes an element in bf16: 1 us at 4.3 TB/s for
// [2,16,128,128]. Latents are small and the launch is the cost; hence 64 threads a block: DiT's 8 x 4 x 32 x 32 make
// 64 blocks.
// Every element's sum is the same chain of fmaf wherever it lies, so that both paths give the same bits.
#include "../common/cuda.h"

namespace difuse {
namespace cuda {
namespace {

constexpr int kThreads = 64;

struct Input {
  const char* data;
  DType dtype;
  int64_t column, sample, stride[kMaxDims];  // its column of C; strides count elements
};
struct Output {
  char* data;
  DType dtype;
  int64_t row;
};
struct Step {
  Input x[kMaxList];     // the inputs that are there, J of them
  Output out[kMaxList];  // the outputs that are wanted, I of them
  int J = 0, I = 0;
  const float* c;              // C of sample 0
  const unsigned* noise;       // seed low, high, step low, high of each sample, or null; its column is the last
  int64_t c_sample = 0, noise_column = 0, noise_sample = 0;
  int64_t samples = 1, n = 1;  // n: elements of a sample
  int blocks;                  // of a sample
  int ndim = 0;                // merged dimensions of a sample, outermost first
  int64_t size[kMaxDims];
};

// --- the noise, defined in sampler_step_reference.py -----------------------------------------------------------------
// Philox4x32-10: the four random words of one group of four elements.
__device__ __forceinline__ void philox(unsigned (&r)[4], const uint4& sample, int64_t group) {
  unsigned k0 = sample.x, k1 = sample.y;
  r[0] = unsigned(group), r[1] = unsigned(uint64_t(group) >> 32), r[2] = sample.z, r[3] = sample.w;
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const unsigned low0 = 0xD2511F53u * r[0], high0 = __umulhi(0xD2511F53u, r[0]);
    const unsigned low1 = 0xCD9E8D57u * r[2], high1 = __umulhi(0xCD9E8D57u, r[2]);
    r[0] = high1 ^ r[1] ^ k0, r[1] = low1, r[2] = high0 ^ r[3] ^ k1, r[3] = low0;
  }
}

// Box and Muller: two normals of two random words.
__device__ __forceinline__ void normals(float& z0, float& z1, unsigned r0, unsigned r1) {
  const float radius = sqrtf(-2.f * logf(fmaf(float(r0), 0x1p-32f, 0x1p-33f)));
  float sine, cosine;
  sincospif(float(r1) * 0x1p-31f, &sine, &cosine);
  z0 = radius * cosine, z1 = radius * sine;
}

__device__ __forceinline__ void normals(float (&z)[8], const uint4& sample, int64_t element) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    unsigned r[4];
    philox(r, sample, element / 4 + i / 4);
    normals(z[i], z[i + 1], r[0], r[1]);
    normals(z[i + 2], z[i + 3], r[2], r[3]);
  }
}
__device__ __forceinline__ void normals(float (&z)[1], const uint4& sample, int64_t element) {
  unsigned r[4];
  philox(r, sample, element / 4);
  const bool second = element & 2;
  float z0, z1;
  normals(z0, z1, second ? r[2] : r[0], second ? r[3] : r[1]);
  z[0] = element & 1 ? z1 : z0;
}

// --- reading ---------------------------------------------------------------------------------------------------------
// 8 elements, or one, as they lie in memory: the loads of all inputs go out before the first is converted.
template <int N> struct Raw {
  uint4 low, high;
  __device__ __forceinline__ void load(const char* at, DType dtype) {
    low = *reinterpret_cast<const uint4*>(at);
    if (dtype == DType::f32) high = *reinterpret_cast<const uint4*>(at + 16);
  }
  __device__ __forceinline__ void convert(float (&to)[8], DType dtype) const {
    if (dtype == DType::f32) {
      memcpy(to, &low, 16);
      memcpy(to + 4, &high, 16);
    } else if (dtype == DType::bf16) {
      halves<bf16>(to);
    } else {
      halves<f16>(to);
    }
  }
  template <class T> __device__ __forceinline__ void halves(float (&to)[8]) const {
    T values[8];
    memcpy(values, &low, 16);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = to_float(values[i]);
  }
};
template <> struct Raw<1> {
  unsigned bits;
  __device__ __forceinline__ void load(const char* at, DType dtype) {
    if (dtype == DType::f32) bits = *reinterpret_cast<const unsigned*>(at);
    else bits = *reinterpret_cast<const unsigned short*>(at);
  }
  __device__ __forceinline__ void convert(float (&to)[1], DType dtype) const {
    const unsigned short half = static_cast<unsigned short>(bits);
    if (dtype == DType::f32) memcpy(to, &bits, 4);
    else if (dtype == DType::bf16) halves<bf16>(to, half);
    else halves<f16>(to, half);
  }
  template <class T> __device__ __forceinline__ static void halves(float (&to)[1], unsigned short half) {
    T value;
    memcpy(&value, &half, 2);
    to[0] = to_float(value);
  }
};

// N: elements of a thread, 8 side by side or one. M: inputs at most.
template <int N, int M, bool noisy> __global__ void __launch_bounds__(kThreads) step(const Step k) {
  __shared__ float c[kMaxList][kMaxList + 1];
  const int64_t sample = blockIdx.x / unsigned(k.blocks);
  const int64_t element = (int64_t(blockIdx.x % unsigned(k.blocks)) * kThreads + threadIdx.x) * N;
  const bool inside = element < k.n;

  int64_t offset[M], rest = inside ? element : 0;
#pragma unroll
  for (int j = 0; j < M; ++j) offset[j] = j < k.J ? sample * k.x[j].sample : 0;
#pragma unroll 1
  for (int d = k.ndim - 1; d >= 0; --d) {
    const int64_t outer = d ? divide(rest, k.size[d]) : 0, index = rest - outer * k.size[d];
#pragma unroll
    for (int j = 0; j < M; ++j)
      if (j < k.J) offset[j] += index * k.x[j].stride[d];
    rest = outer;
  }
  Raw<N> raw[M];
#pragma unroll
  for (int j = 0; j < M; ++j)
    if (j < k.J) raw[j].load(k.x[j].data + (k.x[j].dtype == DType::f32 ? 4 : 2) * offset[j], k.x[j].dtype);
  uint4 words = {};
  if constexpr (noisy) {
    const unsigned* p = k.noise + sample * k.noise_sample;
    words = make_uint4(p[0], p[1], p[2], p[3]);
  }
  const int columns = k.J + noisy;
#pragma unroll 1
  for (int at = threadIdx.x; at < k.I * columns; at += kThreads) {
    const int i = at / columns, j = at % columns;
    c[i][j] = k.c[sample * k.c_sample + k.out[i].row + (j < k.J ? k.x[j].column : k.noise_column)];
  }
  __syncthreads();

  float x[M][N], z[N];
#pragma unroll
  for (int j = 0; j < M; ++j)
    if (j < k.J) raw[j].convert(x[j], k.x[j].dtype);
  if constexpr (noisy) normals(z, words, element);
  if (!inside) return;
#pragma unroll 1
  for (int i = 0; i < k.I; ++i) {
    float sum[N];
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] = c[i][0] * x[0][e];
#pragma unroll
    for (int j = 1; j < M; ++j)
      if (j < k.J)
#pragma unroll
        for (int e = 0; e < N; ++e) sum[e] = fmaf(c[i][j], x[j][e], sum[e]);
    if constexpr (noisy)
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] = fmaf(c[i][k.J], z[e], sum[e]);
    store(k.out[i].data, k.out[i].dtype, sample * k.n + element, sum);
  }
}

// --- the host --------------------------------------------------------------------------------------------------------
void lists(Step& k, const TensorList& inputs, const Tensor& coefficients, const TensorList& outputs) {
  const int last = coefficients.ndim - 1;
  for (int j = 0; j < inputs.n; ++j) {
    const Tensor& x = inputs.item[j];
    if (x) k.x[k.J].data = x.data, k.x[k.J].dtype = x.dtype, k.x[k.J++].column = j * coefficients.stride[last];
  }
  for (int i = 0; i < outputs.n; ++i) {
    const Tensor& out = outputs.item[i];
    if (out) k.out[k.I++] = {out.data, out.dtype, i * coefficients.stride[last - 1]};
  }
}

// Dimension d of the inputs `x`, into the last one if it is dense in all of them.
void merge(Step& k, const Tensor* const* x, int d) {
  const int64_t n = x[0]->size[d];
  k.n *= n;
  if (n == 1) return;
  bool dense = k.ndim > 0;
  for (int j = 0; j < k.J && dense; ++j) dense = k.x[j].stride[k.ndim - 1] == x[j]->stride[d] * n;
  if (!dense) k.size[k.ndim++] = 1;
  k.size[k.ndim - 1] *= n;
  for (int j = 0; j < k.J; ++j) k.x[j].stride[k.ndim - 1] = x[j]->stride[d];
}

// Whether 8 neighbours lie side by side everywhere, the first of them at a multiple of 16 bytes.
bool is_wide(const Step& k) {
  const int last = k.ndim - 1;
  if (last < 0 || k.size[last] % 8) return false;
  for (int j = 0; j < k.J; ++j) {
    const Input& x = k.x[j];
    const int64_t bytes = element_size(x.dtype);
    if (x.stride[last] != 1 || reinterpret_cast<uintptr_t>(x.data) % 16) return false;
    if (k.samples > 1 && x.sample * bytes % 16) return false;
    for (int d = 0; d < last; ++d)
      if (x.stride[d] * bytes % 16) return false;
  }
  for (int i = 0; i < k.I; ++i)
    if (reinterpret_cast<uintptr_t>(k.out[i].data) % 16) return false;
  return true;
}

template <int N, int M> void run(Queue& queue, Step& k) {
  const int64_t blocks = ceil_div(k.n, kThreads * N);
  k.blocks = int(blocks < 0x7fffffff ? blocks : 0x7fffffff);  // more are refused by the launch
  const auto kernel = k.noise ? step<N, M, true> : step<N, M, false>;
  launch(queue, "sampler_step", kernel, k.samples * blocks, kThreads, 0, k);
}

}  // namespace

void sampler_step(Queue& queue, const TensorList& inputs, const Tensor& coefficients, const Tensor& noise,
                  const TensorList& outputs) {
  Step k;
  const Tensor* x[kMaxList];
  for (int j = 0, there = 0; j < inputs.n; ++j)
    if (inputs.item[j]) x[there++] = &inputs.item[j];
  lists(k, inputs, coefficients, outputs);
  if (!k.J || !k.I) return;  // no element, or nothing wanted
  k.c = reinterpret_cast<const float*>(coefficients.data);
  k.noise = reinterpret_cast<const unsigned*>(noise.data);
  if (noise) k.noise_column = inputs.n * coefficients.stride[coefficients.ndim - 1], k.noise_sample = noise.stride[0];
  if (coefficients.ndim == 3) k.c_sample = coefficients.stride[0];
  const bool apart = noise || coefficients.ndim == 3;
  if (apart) k.samples = x[0]->size[0];
  for (int j = 0; j < k.J; ++j) k.x[j].sample = apart ? x[j]->stride[0] : 0;
  for (int d = apart; d < x[0]->ndim; ++d) merge(k, x, d);
  if (k.samples == 0 || k.n == 0) return;
  if (!is_wide(k)) run<1, kMaxList>(queue, k);
  else if (k.J <= 4) run<8, 4>(queue, k);
  else run<8, kMaxList>(queue, k);
}

}  // namespace cuda
}  // namespace difuse
