// Rows of D elements in any of the three dtypes: dispatch on the dtype, conversion to and from float32 scratch.
#pragma once
#include <cstdlib>
#include "simd.h"

namespace difuse {
namespace DIFUSE_ISA {

// Calls body(T{}) with the element type of `dtype`.
template <class F> static inline void with_type(DType dtype, F body) {
  if (dtype == DType::f32) body(float{});
  else if (dtype == DType::bf16) body(bf16{});
  else body(f16{});
}

template <class T> static inline T* at(const Tensor& t, int64_t i, int64_t j = 0) {
  return reinterpret_cast<T*>(t.data) + i * t.stride[0] + j * t.stride[1];
}

// Rows of a tensor: everything but its last dimension.
static inline int64_t rows(const Tensor& h) {
  int64_t n = 1;
  for (int d = 0; d + 1 < h.ndim; ++d) n *= h.size[d];
  return n;
}
// The row that is `number` rows after the first, in row-major order of the leading dimensions.
template <class T> static inline T* row(const Tensor& t, int64_t number) {
  int64_t offset = 0;
  for (int d = t.ndim - 2; d >= 0; --d) offset += number % t.size[d] * t.stride[d], number /= t.size[d];
  return reinterpret_cast<T*>(t.data) + offset;
}

static inline int64_t element_size(DType dtype) {
  return dtype == DType::f32 || dtype == DType::i32 ? 4 : dtype == DType::u8 ? 1 : 2;
}

// body(i, n): n == VL for whole vectors, less for the tail. The two calls inline to straight and masked code.
template <class F> static inline void each_vector(int64_t D, F body) {
  int64_t i = 0;
  for (; i + VL <= D; i += VL) body(i, VL);
  if (i < D) body(i, int(D - i));
}
template <class T> static inline auto get(const T* p, int n) { return n == VL ? load(p) : load(p, n); }
template <class T> static inline void put(T* p, vf v, int n) { n == VL ? store(p, v) : store(p, v, n); }
// Lanes at n and beyond set to zero.
static inline vf first(vf v, int n) {
  if (n == VL) return v;
  for (int i = n; i < VL; ++i) v[i] = 0;
  return v;
}

// The sum of term(i, n) over D elements; lanes beyond them must be zero.
template <class F> static inline float row_sum(int64_t D, F term) {  // four chains hide the latency of the addition
  vf a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * VL <= D; i += 4 * VL) {
    a += term(i, VL), b += term(i + VL, VL), c += term(i + 2 * VL, VL), d += term(i + 3 * VL, VL);
  }
  for (; i + VL <= D; i += VL) a += term(i, VL);
  if (i < D) b += term(i, int(D - i));
  return hsum((a + b) + (c + d));
}

static inline void load_row(float* to, const char* from, DType dtype, int64_t D) {
  with_type(dtype, [&](auto type) {
    const auto* p = reinterpret_cast<const decltype(type)*>(from);
    each_vector(D, [&](int64_t i, int n) { put(to + i, get(p + i, n), n); });
  });
}
static inline void store_row(char* to, const float* from, DType dtype, int64_t D) {
  with_type(dtype, [&](auto type) {
    auto* p = reinterpret_cast<decltype(type)*>(to);
    each_vector(D, [&](int64_t i, int n) { put(p + i, get(from + i, n), n); });
  });
}

// 64-byte aligned floats, freed at the end of the scope.
struct Scratch {
  float* data;
  explicit Scratch(int64_t n) : data(static_cast<float*>(std::aligned_alloc(64, (size_t(n) * 4 + 127) / 64 * 64))) {
    if (!data) std::abort();  // no memory for a few rows: nothing sensible is left to do
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace DIFUSE_ISA
}  // namespace difuse
