// GELU by its approximation with tanh on the CPU, contract in kernels/difuse_kernels/gelu_tanh/gelu_tanh.py.
//
//   out = gelu(x)          dx = dout * gelu'(x)
#include <algorithm>
#include "../common/activations.h"
#include "../common/parallel.h"
#include "../common/rows.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kChunk = 4096;  // elements

// body(i, n) for every vector of a contiguous tensor.
template <class F> void each(const Tensor& x, F body) {
  const int64_t elements = rows(x) * x.size[x.ndim - 1];
  parallel_for((elements + kChunk - 1) / kChunk, kChunk, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk;
    each_vector(std::min(kChunk, elements - begin), [&](int64_t i, int n) { body(begin + i, n); });
  });
}

template <class T> T* data(const Tensor& t) { return reinterpret_cast<T*>(t.data); }

}  // namespace

void gelu_tanh_forward(const Tensor& x, const Tensor& out) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    each(x, [&](int64_t i, int n) { put(data<T>(out) + i, GeluTanh::value(get(data<T>(x) + i, n), nullptr), n); });
  });
}

void gelu_tanh_backward(const Tensor& dout, const Tensor& x, const Tensor& dx) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    each(x, [&](int64_t i, int n) {
      vf slope;
      GeluTanh::value(get(data<T>(x) + i, n), &slope);
      put(data<T>(dx) + i, get(data<T>(dout) + i, n) * slope, n);
    });
  });
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
