// Stands in for CUDA's header: bfloat16 as storage, with conversions right to the bit.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v);
  explicit operator float() const;
};

inline float __bfloat162float(__nv_bfloat16 v) { return emulated_bits<float>(uint32_t(v.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float v) {  // to nearest, ties to even
  const uint32_t all = emulated_bits<uint32_t>(v);
  __nv_bfloat16 b;
  b.bits = (all & 0x7fffffff) > 0x7f800000 ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16;
  return b;
}
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }
inline __nv_bfloat16::__nv_bfloat16(float v) : __nv_bfloat16(__float2bfloat16_rn(v)) {}
inline __nv_bfloat16::operator float() const { return __bfloat162float(*this); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return emulated_bits<__nv_bfloat16>(v); }

struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
