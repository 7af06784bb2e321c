// gram on the CPU, contract in kernels/difuse_kernels/gram/gram.py.
//
//   G[b,i,j] = <v_i, v_j>,   v_0 = 1, v_1 .. v_n = the inputs of sample b
//
// A task is one chunk of one sample: blocks of the inputs are brought to float32 in L1 (float32 inputs are used where
// they lie), multiplied and added up in double. The matrices of a sample's chunks are added in their order, so that
// a sample's bits depend on its size alone.
#include "../common/parallel.h"
#include "../common/rows.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kBlock = 512;   // 4 inputs of 2 KB stay in L1
constexpr int64_t kChunk = 8192;  // elements of a task
constexpr int kMaxInputs = 4, kMaxSums = kMaxInputs * (kMaxInputs + 3) / 2;
constexpr int HALF = VL / 2;

typedef double vd __attribute__((vector_size(VL * 4)));  // half as many lanes as of float
typedef float vhalf __attribute__((vector_size(VL * 2)));

vd load_double(const float* p) {
  vhalf v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vd);
}

double hsum(vd v) {
  double lanes[HALF];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = HALF / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The sums and inner products of a block of n inputs, a vector of partial sums each: x_1, x_1 x_1, x_1 x_2, .. x_2, ..
template <int n> void add(vd* total, const float* const* x, int64_t elements) {
  constexpr int sums = n * (n + 3) / 2, chains = n < 3 ? 2 : 1;  // chains hide the latency of the addition
  vd a[chains][sums] = {};
  const auto step = [&](vd* sum, const vd* v) {
    for (int i = 0, k = 0; i < n; ++i) {
      sum[k++] += v[i];
      for (int j = i; j < n; ++j) sum[k++] += v[i] * v[j];
    }
  };
  int64_t e = 0;
  for (; e + chains * HALF <= elements; e += chains * HALF)
    for (int c = 0; c < chains; ++c) {
      vd v[n];
      for (int i = 0; i < n; ++i) v[i] = load_double(x[i] + e + c * HALF);
      step(a[c], v);
    }
  for (; e < elements; e += HALF) {
    vd v[n];
    for (int i = 0; i < n; ++i) {
      float part[HALF] = {};
      for (int64_t lane = 0; lane < HALF && e + lane < elements; ++lane) part[lane] = x[i][e + lane];
      v[i] = load_double(part);
    }
    step(a[0], v);
  }
  for (int k = 0; k < sums; ++k) {
    total[k] += a[0][k];
    if (chains > 1) total[k] += a[chains - 1][k];
  }
}

void task(double* G, const TensorList& inputs, int64_t sample, int64_t begin, int64_t end) {
  alignas(64) float scratch[kMaxInputs][kBlock];
  vd total[kMaxSums] = {};
  const int n = inputs.n;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t elements = end - at < kBlock ? end - at : kBlock;
    const float* block[kMaxInputs];
    for (int i = 0; i < n; ++i) {
      const Tensor& x = inputs.item[i];
      const char* from = x.data + (sample * x.stride[0] + at) * element_size(x.dtype);
      if (x.dtype == DType::f32) {
        block[i] = reinterpret_cast<const float*>(from);
      } else {
        load_row(scratch[i], from, x.dtype, elements);
        block[i] = scratch[i];
      }
    }
    if (n == 1) add<1>(total, block, elements);
    else if (n == 2) add<2>(total, block, elements);
    else if (n == 3) add<3>(total, block, elements);
    else add<4>(total, block, elements);
  }
  G[0] = double(end - begin);
  for (int i = 1, k = 0; i <= n; ++i) {
    G[i] = G[i * (n + 1)] = hsum(total[k++]);
    for (int j = i; j <= n; ++j) G[i * (n + 1) + j] = G[j * (n + 1) + i] = hsum(total[k++]);
  }
}

}  // namespace

void gram(const TensorList& inputs, const Tensor& G) {
  const Tensor& x = inputs.item[0];
  const int entries = (inputs.n + 1) * (inputs.n + 1);
  const int64_t B = G.size[0];
  int64_t elements = x ? 1 : 0;
  for (int d = 1; d < x.ndim; ++d) elements *= x.size[d];
  const int64_t chunks = (elements + kChunk - 1) / kChunk;
  double* to = reinterpret_cast<double*>(G.data);
  const Scratch scratch(chunks == 1 ? 0 : 2 * B * chunks * entries);
  double* found = chunks == 1 ? to : reinterpret_cast<double*>(scratch.data);  // [B,chunks,n+1,n+1]
  parallel_for(B * chunks, (elements < kChunk ? elements : kChunk) * (inputs.n + 1) / 2 + 1, [&](int64_t i) {
    const int64_t begin = i % chunks * kChunk;
    task(found + i * entries, inputs, i / chunks, begin, begin + kChunk < elements ? begin + kChunk : elements);
  });
  for (int64_t i = 0; i < B * entries && chunks != 1; ++i) {
    const double* from = found + i / entries * chunks * entries + i % entries;
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += from[chunk * entries];
    to[i] = total;
  }
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
