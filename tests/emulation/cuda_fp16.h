// Stands in for CUDA's header: float16 as storage, with conversions right to the bit.
#pragma once
#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
  __half() = default;
  explicit __half(float v);
  explicit operator float() const;
};

inline float __half2float(__half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, size = v.bits & 0x7fff;
  if (size >= 0x7c00) return emulated_bits<float>(sign | 0x7f800000 | (size - 0x7c00) << 13);  // infinite, nan
  const float tiny = float(size) * 0x1p-24f;                                                   // subnormal
  if (size < 0x0400) return emulated_bits<float>(sign | emulated_bits<uint32_t>(tiny));
  return emulated_bits<float>(sign | ((size << 13) + (112u << 23)));
}

inline __half __float2half_rn(float v) {  // to nearest, ties to even
  const uint32_t all = emulated_bits<uint32_t>(v), sign = all >> 16 & 0x8000, size = all & 0x7fffffff;
  __half h;
  if (size > 0x7f800000) h.bits = 0x7fff;                         // nan
  else if (size >= 0x477ff000) h.bits = sign | 0x7c00;            // 65520 and more
  else if (size < 0x38800000)                                     // subnormal: 1/2 has the same unit, 2^-24
    h.bits = sign | (emulated_bits<uint32_t>(emulated_bits<float>(size) + 0.5f) - 0x3f000000);
  else h.bits = sign | ((size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13);
  return h;
}
inline __half __float2half(float v) { return __float2half_rn(v); }
inline __half::__half(float v) : __half(__float2half_rn(v)) {}
inline __half::operator float() const { return __half2float(*this); }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short v) { return emulated_bits<__half>(v); }

struct alignas(4) __half2 { __half x, y; };
using half2 = __half2;
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
