// 8-bit codes of a row of floats: scale = max |v| / 127, code = round(v / scale) + 128.
#pragma once
#include "rows.h"

namespace difuse {
namespace DIFUSE_ISA {

constexpr int kZeroCode = 128;

// Codes of K floats, whose scale is returned: nan where one is not finite. value(i, n): n of them from i on, asked twice.
template <class F> static inline float encode(int64_t K, uint8_t* codes, F value) {
  vi largest = {};  // of the bits without signs: ordered as floats are, then infinity, then nans
  each_vector(K, [&](int64_t i, int n) {
    const vi bits = (vi)first(value(i, n), n) & 0x7fffffff;
    largest = largest > bits ? largest : bits;
  });
  int32_t bits = 0;
  for (int lane = 0; lane < VL; ++lane) bits = bits > largest[lane] ? bits : largest[lane];
  const float most = bits_to_float(uint32_t(bits));
  const bool empty = !(most > 1e-35f), finite = bits < 0x7f800000;  // 127 / most must be finite
  const float inverse = empty || !finite ? 0.f : 127.f / most;
  each_vector(K, [&](int64_t i, int n) {
    // the magic number leaves the rounded sum in the lowest byte of the mantissa
    const vb code = low_bytes((vi)(value(i, n) * inverse + (0x1.8p23f + kZeroCode)));
    if (n == VL) std::memcpy(codes + i, &code, VL);
    else for (int lane = 0; lane < n; ++lane) codes[i + lane] = code[lane];
  });
  return finite ? empty ? 0.f : most / 127.f : __builtin_nanf("");
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
