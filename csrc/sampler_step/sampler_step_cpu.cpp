// sampler_step on the CPU, contract in kernels/difuse_kernels/sampler_step/sampler_step.py.
//
//   out_i = sum_j C[i,j] * x_j
//
// Dimensions that are dense in every input are merged, which leaves a few runs (one, or one per sample) of elements. A
// task is one chunk of one run; inside it, blocks of kBlock elements of every input are brought to float32 in L1
// (float32 inputs are used where they lie), summed, and written. Each element's sum is the same chain of multiply-adds
// wherever it lies, so results do not depend on the batch or on the threads.
#include <math.h>
#include "../common/parallel.h"
#include "../common/rows.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kBlock = 512;   // 8 inputs of 2 KB stay in L1
constexpr int64_t kChunk = 8192;  // elements of a task

struct Step {
  const Tensor* x[kMaxList];    // the inputs that are there, J of them
  const Tensor* out[kMaxList];  // the outputs that are wanted, I of them
  int J = 0, I = 0;
  const char* c;  // coefficients of sample 0
  int64_t c_batch = 0, c_row[kMaxList], c_column[kMaxList + 1];
  const uint32_t* noise;  // seed low, high, step low, high of each sample, or null; its column is the last
  int64_t noise_batch = 0;
  int ndim = 0;  // merged dimensions, outermost first; the last is the run
  int64_t size[kMaxDims], stride[kMaxList][kMaxDims];
  bool per_sample;

  Step(const TensorList& inputs, const Tensor& coefficients, const Tensor& noise_, const TensorList& outputs) {
    const int last = coefficients.ndim - 1;
    for (int j = 0; j < inputs.n; ++j)
      if (inputs.item[j]) c_column[J] = j * coefficients.stride[last], x[J++] = &inputs.item[j];
    for (int i = 0; i < outputs.n; ++i)
      if (outputs.item[i]) c_row[I] = i * coefficients.stride[last - 1], out[I++] = &outputs.item[i];
    c = coefficients.data;
    noise = reinterpret_cast<const uint32_t*>(noise_.data);
    if (noise) c_column[J] = inputs.n * coefficients.stride[last], noise_batch = noise_.stride[0];
    per_sample = noise || coefficients.ndim == 3;
    if (!J || !I) return;  // no element, or nothing wanted
    if (per_sample) {      // the samples stay apart, what follows starts a run of its own
      if (coefficients.ndim == 3) c_batch = coefficients.stride[0];
      open(x[0]->size[0]);
      for (int j = 0; j < J; ++j) stride[j][0] = x[j]->stride[0];
    }
    open(1);
    for (int d = per_sample; d < x[0]->ndim; ++d) merge(d);
  }

  void open(int64_t n) {
    size[ndim++] = n;
    for (int j = 0; j < J; ++j) stride[j][ndim - 1] = 1;
  }
  void merge(int d) {
    const int64_t n = x[0]->size[d];
    if (n == 1) return;
    bool dense = true;
    for (int j = 0; j < J && size[ndim - 1] > 1; ++j) dense = dense && stride[j][ndim - 1] == x[j]->stride[d] * n;
    if (!dense) open(1);
    size[ndim - 1] *= n;
    for (int j = 0; j < J; ++j) stride[j][ndim - 1] = x[j]->stride[d];
  }
};

void sum(const float* const* x, const float* c, int J, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL) {
    vf a[4];
    for (int v = 0; v < 4; ++v) a[v] = c[0] * load(x[0] + i + v * VL);
    for (int j = 1; j < J; ++j)
      for (int v = 0; v < 4; ++v) a[v] += c[j] * load(x[j] + i + v * VL);
    for (int v = 0; v < 4; ++v) store(out + i + v * VL, a[v]);
  }
  each_vector(n - i, [&](int64_t k, int m) {
    vf a = c[0] * get(x[0] + i + k, m);
    for (int j = 1; j < J; ++j) a += c[j] * get(x[j] + i + k, m);
    put(out + i + k, a, m);
  });
}

// n elements `stride` apart as float32: in place if they are that already.
const float* read_block(float* scratch, const char* from, DType dtype, int64_t stride, int64_t n) {
  if (stride == 1 && dtype == DType::f32) return reinterpret_cast<const float*>(from);
  if (stride == 1) {
    load_row(scratch, from, dtype, n);
  } else {
    with_type(dtype, [&](auto type) {
      const auto* p = reinterpret_cast<const decltype(type)*>(from);
      for (int64_t i = 0; i < n; ++i) scratch[i] = to_float(p[i * stride]);
    });
  }
  return scratch;
}

// Standard normal noise of elements at .. at + n - 1 of a sample; the stream is defined in sampler_step_reference.py.
void normals(float* out, const uint32_t* sample, int64_t at, int64_t n) {
  const float word = 0x1p-32f, turn = 6.2831853071795864769f;
  for (int64_t group = at / 4; 4 * group < at + n; ++group) {
    uint32_t r[4] = {uint32_t(group), uint32_t(uint64_t(group) >> 32), sample[2], sample[3]};
    uint32_t k0 = sample[0], k1 = sample[1];
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {  // Philox4x32-10
      const uint64_t a = uint64_t(0xD2511F53u) * r[0], b = uint64_t(0xCD9E8D57u) * r[2];
      r[0] = uint32_t(b >> 32) ^ r[1] ^ k0, r[1] = uint32_t(b);
      r[2] = uint32_t(a >> 32) ^ r[3] ^ k1, r[3] = uint32_t(a);
    }
    for (int pair = 0; pair < 4; pair += 2) {
      const float radius = sqrtf(-2 * logf(float(r[pair]) * word + 0x1p-33f));
      const float angle = turn * (float(r[pair + 1]) * word);
      const int64_t i = 4 * group + pair - at;
      if (i >= 0 && i < n) out[i] = radius * cosf(angle);
      if (i + 1 >= 0 && i + 1 < n) out[i + 1] = radius * sinf(angle);
    }
  }
}

void task(const Step& k, int64_t run, int64_t begin, int64_t end) {
  alignas(64) float scratch[kMaxList + 2][kBlock];
  float c[kMaxList][kMaxList + 1];
  const char* x[kMaxList];
  const int last = k.ndim - 1;
  const int columns = k.J + (k.noise != nullptr);
  int64_t sample = 0, runs = 1, offset[kMaxList] = {};  // runs: of a sample
  for (int64_t d = last - 1, rest = run; d >= 0; --d) {
    for (int j = 0; j < k.J; ++j) offset[j] += rest % k.size[d] * k.stride[j][d];
    if (d == 0 && k.per_sample) sample = rest;
    rest /= k.size[d];
  }
  for (int d = 1; d < last; ++d) runs *= k.size[d];
  const float* coefficients = reinterpret_cast<const float*>(k.c) + sample * k.c_batch;
  for (int i = 0; i < k.I; ++i)
    for (int j = 0; j < columns; ++j) c[i][j] = coefficients[k.c_row[i] + k.c_column[j]];
  for (int j = 0; j < k.J; ++j) x[j] = k.x[j]->data + offset[j] * element_size(k.x[j]->dtype);

  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    const float* block[kMaxList + 1];
    for (int j = 0; j < k.J; ++j) {
      const int64_t stride = k.stride[j][last];
      block[j] = read_block(scratch[j], x[j] + at * stride * element_size(k.x[j]->dtype), k.x[j]->dtype, stride, n);
    }
    if (k.noise) {
      normals(scratch[k.J], k.noise + sample * k.noise_batch, run % runs * k.size[last] + at, n);
      block[k.J] = scratch[k.J];
    }
    for (int i = 0; i < k.I; ++i) {
      const Tensor& out = *k.out[i];
      char* to = out.data + (run * k.size[last] + at) * element_size(out.dtype);
      const bool direct = out.dtype == DType::f32;
      float* result = direct ? reinterpret_cast<float*>(to) : scratch[kMaxList + 1];
      sum(block, c[i], columns, result, n);
      if (!direct) store_row(to, result, out.dtype, n);
    }
  }
}

}  // namespace

void sampler_step(const TensorList& inputs, const Tensor& coefficients, const Tensor& noise,
                  const TensorList& outputs) {
  const Step k(inputs, coefficients, noise, outputs);
  if (!k.J || !k.I) return;
  const int64_t length = k.size[k.ndim - 1], chunks = (length + kChunk - 1) / kChunk;
  int64_t runs = 1;
  for (int d = 0; d < k.ndim - 1; ++d) runs *= k.size[d];
  // 32768 elements of 3 inputs took 24 us on one thread and 20 on two: not worth two threads yet
  const int work = k.J + k.I + (k.noise ? 16 : 0);
  parallel_for(runs * chunks, (length < kChunk ? length : kChunk) * work / 16 + 1, [&](int64_t i) {
    const int64_t begin = i % chunks * kChunk;
    task(k, i / chunks, begin, begin + kChunk < length ? begin + kChunk : length);
  });
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
