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

// The same within 2e-4 of the result, for what is rounded to 16 or 8 bits next.
struct RoughGeluTanh {
  static vf value(vf z, vf*) {
#if defined(DIFUSE_AVX512)
    const vf exponent = z * (-2.30220819f - 0.102943240f * (z * z));
    const vf f = (vf)_mm512_reduce_ps((__m512)exponent, 0);
    vf p = splat(5.500829e-2f);
    p = p * f + 2.4221106e-1f;
    p = p * f + 6.9328301e-1f;
    p = p * f + 1.f;
    return z * (vf)_mm512_rcp14_ps((__m512)(1.f + (vf)_mm512_scalef_ps((__m512)p, (__m512)(exponent - f))));
#else
    return GeluTanh::value(z, nullptr);
#endif
  }
};

}  // namespace DIFUSE_ISA
}  // namespace difuse
