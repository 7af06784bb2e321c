// exp and its relatives on vectors, to float32's precision. A nan may come out as anything: multiply by its source.
#pragma once
#include "simd.h"

namespace difuse {
namespace DIFUSE_ISA {

// e^x for |x| <= 87, by Cephes's polynomial of e^f, f within ln 2 / 2: e^f 2^n with f = x - n ln 2, ln 2 in two parts,
// the first a short one, so that no bit of x is lost.
static inline vf exp_within(vf x) {
  const vf shifted = x * 1.44269504f + 0x1.8p23f;  // n lands in the low mantissa bits
  const vf n = shifted - 0x1.8p23f;
  const vf f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + (f + 1.f);
  return (vf)((vi)p + ((vi)shifted << 23));
}

// e^x for x below 88; below -87 it is 0.
static inline vf exp(vf x) { return x < -87.f ? vf{} : exp_within(vmax(splat(-87.f), x)); }

// 1 / (1 + e^-x), and one minus it without cancellation.
static inline void sigmoid(vf x, vf& value, vf& complement) {
  const vf e = exp(x < 0.f ? x : -x);
  const vf large = 1.f / (1.f + e), small = e * large;
  value = x < 0.f ? small : large;
  complement = x < 0.f ? large : small;
}

// The normal distribution function (1 + erf(x / sqrt 2)) / 2. No difference in the lower tail: 1e-5 off at -3
// and 1e-4 at -6, relatively, where 1 + erf(x) has lost all its digits.
static inline vf normal_cdf(vf x) {
  const vf a = x * 0.707106781f;
  const vf t = vmin(splat(10.f), a < 0.f ? -a : a), s = a * a;
  // t > 0.93: 1 - erf(t) = e^p(t), near 0: erf(a) = a + a q(a^2); minimax polynomials, below 1 unit each
  vf p = splat(-1.72853470e-5f) * t + 3.83197126e-4f;
  p = p * (t * t) + (splat(-3.88396438e-3f) * t + 2.42546219e-2f);
  p = p * t - 1.06777877e-1f;
  p = p * t - 6.34846687e-1f;
  p = p * t - 1.28717512e-1f;
  p = p * t - t;
  vf q = splat(-5.96761703e-4f);
  q = q * s + 4.99119423e-3f;
  q = q * s - 2.67681349e-2f;
  q = q * s + 1.12819925e-1f;
  q = q * s - 3.76125336e-1f;
  q = q * s + 1.28379166e-1f;
  const vf tail = 0.5f * exp(p), inner = 0.5f + 0.5f * (a + a * q);
  return t > 0.927734375f ? (x < 0.f ? tail : 1.f - tail) : inner;
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
