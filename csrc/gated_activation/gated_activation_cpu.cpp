// Gated activations on the CPU, contract in kernels/difuse_kernels/gated_activation/gated_activation.py.
//
//   h = [a | b] along the last dimension; z is the half that is activated, l the other
//   out = l * act(z)          dl = dout * act(z)          dz = dout * l * act'(z)
#include "../common/activations.h"
#include "../common/parallel.h"
#include "../common/rows.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

template <class Act, class T> void forward(const Tensor& h, bool first, const Tensor& out) {
  const int64_t F = h.size[h.ndim - 1] / 2;
  parallel_for(rows(h), F, [&](int64_t i) {
    const T *left = row<T>(h, i), *z = first ? left : left + F, *l = first ? left + F : left;
    T* to = row<T>(out, i);
    each_vector(F, [&](int64_t j, int n) { put(to + j, get(l + j, n) * Act::value(get(z + j, n), nullptr), n); });
  });
}

template <class Act, class T> void backward(const Tensor& dout, const Tensor& h, bool first, const Tensor& dh) {
  const int64_t F = h.size[h.ndim - 1] / 2;
  parallel_for(rows(h), 2 * F, [&](int64_t i) {
    const T *left = row<T>(h, i), *z = first ? left : left + F, *l = first ? left + F : left, *g = row<T>(dout, i);
    T *dleft = row<T>(dh, i), *dz = first ? dleft : dleft + F, *dl = first ? dleft + F : dleft;
    each_vector(F, [&](int64_t j, int n) {
      const vf grad = get(g + j, n);
      vf slope;
      put(dl + j, grad * Act::value(get(z + j, n), &slope), n);
      put(dz + j, grad * get(l + j, n) * slope, n);
    });
  });
}

// Calls body(Act{}, T{}); the name was checked by the contract.
template <class F> void with_activation(const char* name, DType dtype, F body) {
  with_type(dtype, [&](auto type) {
    if (name[0] == 's') body(Silu{}, type);
    else if (name[4] == '_') body(GeluTanh{}, type);
    else body(Gelu{}, type);
  });
}

}  // namespace

void gated_activation_forward(const Tensor& h, const char* activation, bool first, const Tensor& out) {
  with_activation(activation, h.dtype, [&](auto act, auto type) {
    forward<decltype(act), decltype(type)>(h, first, out);
  });
}

void gated_activation_backward(const Tensor& dout, const Tensor& h, const char* activation, bool first,
                               const Tensor& dh) {
  with_activation(activation, h.dtype, [&](auto act, auto type) {
    backward<decltype(act), decltype(type)>(dout, h, first, dh);
  });
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
