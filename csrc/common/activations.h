// Activations on vectors.
#pragma once
#include "vector_math.h"

namespace difuse {
namespace DIFUSE_ISA {

// Each gives act(z) and, where wanted, act'(z).
struct Identity {
  static vf value(vf z, vf* slope) {
    if (slope) *slope = splat(1.f);
    return z;
  }
};
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
    if (!slope) {  // z / (1 + e^-2u), the exponent in base 2
      const vf exponent = z * (-2.30220819f - 0.102943240f * square);
      return z / (1.f + (exponent > 127.f ? splat(__builtin_inff()) : exp2(exponent)));
    }
    vf s, rest;
    sigmoid(z * (1.59576912f + 0.0713548163f * square), s, rest);
    if (slope) *slope = s + z * s * rest * (1.59576912f + 0.214064449f * square);
    return z * s;
  }
};

}  // namespace DIFUSE_ISA
}  // namespace difuse
