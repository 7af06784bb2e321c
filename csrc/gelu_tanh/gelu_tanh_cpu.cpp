// GELU by its approximation with tanh on the CPU, contract in kernels/difuse_kernels/gelu_tanh/gelu_tanh.py.
//
//   out = gelu(x)          dx = dout * gelu'(x)
#include "../common/activations.h"
#include "../common/parallel.h"
#include "../common/rows.h"

namespace difuse {
namespace DIFUSE_ISA {

void gelu_tanh_forward(const Tensor& x, const Tensor& out) {
  const int64_t F = x.size[x.ndim - 1];
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(rows(x), F, [&](int64_t i) {
      const T* from = row<T>(x, i);
      T* to = row<T>(out, i);
      each_vector(F, [&](int64_t j, int n) { put(to + j, GeluTanh::value(get(from + j, n), nullptr), n); });
    });
  });
}

void gelu_tanh_backward(const Tensor& dout, const Tensor& x, const Tensor& dx) {
  const int64_t F = x.size[x.ndim - 1];
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(rows(x), 2 * F, [&](int64_t i) {
      const T *from = row<T>(x, i), *grad = row<T>(dout, i);
      T* to = row<T>(dx, i);
      each_vector(F, [&](int64_t j, int n) {
        vf slope;
        GeluTanh::value(get(from + j, n), &slope);
        put(to + j, get(grad + j, n) * slope, n);
      });
    });
  });
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
