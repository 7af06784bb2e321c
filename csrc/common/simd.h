// Vectors of float on GCC's vector extensions: one source for every instruction set, VL lanes each.
// Everything lives in the namespace of its instruction set and is static, so that no function compiled for a newer CPU
// can be merged by the linker into code that runs on an older one.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include "ops.h"

namespace difuse {
namespace DIFUSE_ISA {

#if defined(DIFUSE_VL)  // a test build: wide vectors on a CPU that has none, without intrinsics
constexpr int VL = DIFUSE_VL;
#elif defined(__AVX512F__)
#define DIFUSE_AVX512
constexpr int VL = 16;
#elif defined(__AVX2__)
#define DIFUSE_AVX2
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

static inline float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

static inline vf splat(float a) { return a - vf{}; }  // a - 0 is a for every a, -0 too: no instruction is left
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline vf vmin(vf a, vf b) { return a < b ? a : b; }

// Lane i of the result is lane i ^ W.
template <int W, int... I> static inline vf swapped(vf v, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (I ^ W)...);
#else
  return __builtin_shuffle(v, vi{(I ^ W)...});
#endif
}
template <int W> static inline vf swapped(vf v) { return swapped<W>(v, std::make_integer_sequence<int, VL>{}); }

template <int W = VL / 2> static inline float hsum(vf v) {  // a fixed tree: the same bits every time
  v += swapped<W>(v);
  if constexpr (W > 1) return hsum<W / 2>(v);
  else return v[0];
}
template <int W = VL / 2> static inline float hmax(vf v) {
  v = vmax(v, swapped<W>(v));
  if constexpr (W > 1) return hmax<W / 2>(v);
  else return v[0];
}

// --- one element -----------------------------------------------------------------------------------------------------
static inline float to_float(float a) { return a; }
static inline float to_float(bf16 a) { return bits_to_float(uint32_t(a.bits) << 16); }
static inline float to_float(f16 a) {
  const uint32_t sign = uint32_t(a.bits & 0x8000) << 16, rest = a.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, nan
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));    // 2^112 mends the exponent bias
}
static inline void from_float(float f, float& out) { out = f; }
static inline void from_float(float f, bf16& out) {  // round to nearest even; a nan stays a quiet nan
  const uint32_t u = float_to_bits(f);
  out.bits = f != f ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline void from_float(float f, f16& out) {
  const uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) { out.bits = uint16_t(sign | 0x7e00); return; }
  if (rest >= 0x47800000) { out.bits = uint16_t(sign | 0x7c00); return; }  // 65536 and more: inf
  if (rest < 0x38800000) {  // subnormal in f16: let a float addition do the rounding
    out.bits = uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000));
    return;
  }
  out.bits = uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

// --- VL elements -----------------------------------------------------------------------------------------------------
static inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
static inline vi load(const int32_t* p) { vi v; std::memcpy(&v, p, sizeof v); return v; }
// The intrinsics below do what the generic lines do; GCC 12 needs twice the instructions for the latter.
static inline vf load(const bf16* p) {
#if defined(DIFUSE_AVX512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(DIFUSE_AVX2)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vu u = __builtin_convertvector(h, vu) << 16;
  return (vf)u;
#endif
}
static inline vf load(const f16* p) {
#if defined(DIFUSE_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(DIFUSE_AVX2)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int i = 0; i < VL; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline void store(int32_t* p, vi v) { std::memcpy(p, &v, sizeof v); }
static inline vh to_bf16(vf v) {
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const vu nan = vu{} + 0x7fc0;
  const vu bits = v != v ? nan : rounded;
#if defined(DIFUSE_AVX512)
  return (vh)_mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(DIFUSE_AVX2)
  const __m256i wide = (__m256i)bits;
  return (vh)_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#else
  return __builtin_convertvector(bits, vh);
#endif
}
static inline void store(bf16* p, vf v) { const vh h = to_bf16(v); std::memcpy(p, &h, sizeof h); }
static inline void store(f16* p, vf v) {
#if defined(DIFUSE_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(DIFUSE_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VL; ++i) from_float(v[i], p[i]);
#endif
}

// The lowest byte of each lane.
typedef uint8_t vb __attribute__((vector_size(VL)));
static inline vb low_bytes(vi v) {
#if defined(DIFUSE_AVX512)
  return (vb)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(DIFUSE_AVX2)
  const __m256i wide = (__m256i)(v & 255);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(half, half));
  return (vb)bytes;
#else
  return __builtin_convertvector(v, vb);
#endif
}

// The first n < VL elements; lanes beyond them read as zero and are not written.
template <class T> static inline vf load(const T* p, int n) {
  T part[VL] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T> static inline void store(T* p, vf v, int n) {
  T part[VL];
  store(part, v);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

// sum + the products of two pairs of bfloat16, in each lane; a pair is 32 bits, the first of the two in the lower half.
// DIFUSE_BF16_DOTS: the CPU has an instruction for it, or a test build pretends to.
#if defined(__AVX512BF16__) && defined(DIFUSE_AVX512)
#define DIFUSE_BF16_DOTS
static inline vf dot(vf sum, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#elif defined(DIFUSE_BF16_DOTS)
static inline vf dot(vf sum, vi a, vi b) {
  const vi high = vi{} + int32_t(0xffff0000);
  return sum + ((vf)(a & high) * (vf)(b & high) + (vf)(a << 16) * (vf)(b << 16));
}
#endif

// 2^x. Cephes-style: 2^fraction by a polynomial, times 2^round(x) by adding to its exponent; relative error below 1e-7.
// x <= -126 gives 0 (so -inf does), x is expected below 127; a nan stays a nan.
static inline vf exp2(vf x) {
  const vf clamped = vmax(splat(-127.f), x);       // with a nan the second operand is kept
  const vf shifted = clamped + 0x1.8p23f;          // the integer part lands in the low mantissa bits
  const vf f = clamped - (shifted - 0x1.8p23f);    // [-1/2, 1/2]
  vf p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
  const vi scaled = (vi)p + ((vi)shifted << 23);   // what is not the integer part leaves at the top
  return x < -126.f ? vf{} : (vf)scaled;
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
