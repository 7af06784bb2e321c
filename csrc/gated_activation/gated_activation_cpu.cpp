// Gated activations on the CPU, contract in kernels/difuse_kernels/gated_activation/gated_activation.py.
//
//   h = [a | b] along the last dimension; z is the half that is activated, l the other
//   out = l * act(z)          dl = dout * act(z)          dz = dout * l * act'(z)
#include "../common/parallel.h"
#include "../common/rows.h"
#include "../common/vector_math.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

// Each gives act(z) and, where wanted, act'(z).
struct Silu {
  static vf value(vf z, vf* slope) {
    vf s, rest;
    sigmoid(z, s, rest);
    if (slope) *slope = s * (1.f + z * rest);
    return z * s;
  }
};
struct Gelu {
  static vf value(vf z, vf* slope) {
    const vf cdf = normal_cdf(z);
    if (slope) *slope = cdf + z * (0.398942280f * exp(z * z * -0.5f));  // 1 / sqrt(2 pi)
    return z * cdf;
  }
};
struct GeluTanh {  // (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (z + 0.044715 z^3)
  static vf value(vf z, vf* slope) {
    const vf square = z * z;
    vf s, rest;
    sigmoid(z * (1.59576912f + 0.0713548163f * square), s, rest);
    if (slope) *slope = s + z * s * rest * (1.59576912f + 0.214064449f * square);
    return z * s;
  }
};

int64_t rows(const Tensor& h) {
  int64_t n = 1;
  for (int d = 0; d + 1 < h.ndim; ++d) n *= h.size[d];
  return n;
}
// The row that is `number` rows after the first, in row-major order of the leading dimensions.
template <class T> T* row(const Tensor& t, int64_t number) {
  int64_t offset = 0;
  for (int d = t.ndim - 2; d >= 0; --d) offset += number % t.size[d] * t.stride[d], number /= t.size[d];
  return reinterpret_cast<T*>(t.data) + offset;
}

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
