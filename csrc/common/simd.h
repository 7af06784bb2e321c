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
#if defined(__AVX512BF16__) && defined(DIFUSE_AVX512)
  return (vh)_mm512_cvtneps_pbh((__m512)v);  // numbers below 2^-126 become 0
#else
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
#if defined(DIFUSE_AVX512)
static inline __mmask16 lanes(int n) { return __mmask16((1u << n) - 1); }
static inline vf load(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(lanes(n), p); }
static inline vi load(const int32_t* p, int n) { return (vi)_mm512_maskz_loadu_epi32(lanes(n), p); }
static inline vf load(const bf16* p, int n) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p)), 16);
}
static inline vf load(const f16* p, int n) { return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)); }
template <class T> static inline void store(T* p, vf v, int n) {  // a masked store takes longer, of 16-bit numbers
  T part[VL];
  store(part, v);
  if (n == VL / 2) std::memcpy(p, part, sizeof(T) * VL / 2);  // head dimensions are multiples of 8
  else for (int i = 0; i < n; ++i) p[i] = part[i];
}
#else
template <class T> static inline auto load(const T* p, int n) {
  T part[VL] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T> static inline void store(T* p, vf v, int n) {
  T part[VL];
  store(part, v);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}
#endif

// VL rows of VL numbers of 32 bits become columns. Each step exchanges the off-diagonal quarters of squares of 2 W.
template <int W, int... I> static inline void exchange(vi& a, vi& b, std::integer_sequence<int, I...>) {
  const vi from_a = a;
#if defined(__clang__)
  a = __builtin_shufflevector(a, b, (I & W ? VL + I - W : I)...);
  b = __builtin_shufflevector(from_a, b, (I & W ? VL + I : I + W)...);
#else
  a = __builtin_shuffle(a, b, vi{(I & W ? VL + I - W : I)...});
  b = __builtin_shuffle(from_a, b, vi{(I & W ? VL + I : I + W)...});
#endif
}
template <int W = VL / 2> static inline void transpose(vi (&rows)[VL]) {
  for (int i = 0; i < VL; ++i)
    if (!(i & W)) exchange<W>(rows[i], rows[i | W], std::make_integer_sequence<int, VL>{});
  if constexpr (W > 1) transpose<W / 2>(rows);
}

// sum + the products of two pairs of bfloat16, in each lane; a pair is 32 bits, the first of the two in the lower half.
// DIFUSE_BF16_DOTS: the CPU has an instruction for it, or a test build pretends to.
#if defined(__AVX512BF16__) && defined(DIFUSE_AVX512)
#define DIFUSE_BF16_DOTS
static inline vf dot(vf sum, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#else
static inline vf dot(vf sum, vi a, vi b) {
  const vi high = vi{} + int32_t(0xffff0000);
  return sum + ((vf)(a & high) * (vf)(b & high) + (vf)(a << 16) * (vf)(b << 16));
}
#endif

// sum + the four products of 8-bit numbers, a's unsigned and b's signed, in each lane. kSaturates: exact only as long as
// two products together stay within 16 bits.
#if defined(DIFUSE_AVX512) && defined(__AVX512VNNI__)
constexpr bool kSaturates = false;
static inline vi dot(vi sum, vi a, vi b) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
#elif defined(DIFUSE_AVX512)
constexpr bool kSaturates = true;
static inline vi dot(vi sum, vi a, vi b) {
  return sum + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)a, (__m512i)b), _mm512_set1_epi16(1));
}
#elif defined(DIFUSE_AVX2)
constexpr bool kSaturates = true;
static inline vi dot(vi sum, vi a, vi b) {
  return sum + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)b), _mm256_set1_epi16(1));
}
#else
constexpr bool kSaturates = false;
static inline vi dot(vi sum, vi a, vi b) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b << (24 - i) >> 24);
  return sum;
}
#endif

// 2^x: 2^fraction by a polynomial on [-1/2, 1/2], relative error below 1e-7, then its exponent. x <= -126 gives 0 or next
// to it (-inf gives 0), x is expected below 127; a nan stays a nan.
static inline vf exp2_of_fraction(vf f) {
  vf p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return p * f + 1.f;
}
static inline vf exp2(vf x) {
#if defined(DIFUSE_AVX512)
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 0);  // x - round(x), and 0 of an infinity
  return (vf)_mm512_scalef_ps((__m512)exp2_of_fraction(f), (__m512)(x - f));
#else
  const vf clamped = vmax(splat(-127.f), x);     // with a nan the second operand is kept
  const vf shifted = clamped + 0x1.8p23f;        // the integer part lands in the low mantissa bits
  const vf p = exp2_of_fraction(clamped - (shifted - 0x1.8p23f));
  const vi scaled = (vi)p + ((vi)shifted << 23);  // what is not the integer part leaves at the top
  return x < -126.f ? vf{} : (vf)scaled;
#endif
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
