// Small matrix products on operands that already lie in the caches: C[M,N] = or += A[M,K] B[K,N]. Elements of A and B are
// 32 bits: a float, or a pair of bfloat16 or four 8-bit numbers that follow each other along k; K counts elements. The
// caller packs and blocks; here is only the register blocking. Each element of C is summed over k in order, in one
// chain, so its bits do not depend on how M and N were split.
#pragma once
#include "simd.h"

namespace difuse {
namespace DIFUSE_ISA {

// What is multiplied: E is an element of A and B, N the numbers in it, C an element of the sums.
struct Floats {
  using E = float;
  using C = float;
  static constexpr int64_t N = 1;
  static vf add_product(vf sum, vf right, float left) { return sum + right * left; }
};
struct Pairs {
  using E = int32_t;
  using C = float;
  static constexpr int64_t N = 2;
  static vf add_product(vf sum, vi right, int32_t left) { return dot(sum, right, vi{} + left); }
};
struct Quads {  // A unsigned, B signed
  using E = int32_t;
  using C = int32_t;
  static constexpr int64_t N = 4;
  static vi add_product(vi sum, vi right, int32_t left) { return dot(sum, vi{} + left, right); }
};

// Rows of C held in registers beside NV vectors of columns: 12 accumulators of 16 registers, 24 of 32.
constexpr int kTileVectors = VL == 16 ? 4 : 3;  // Zen 4, head dimension 64: 6 x 4 vectors is 8 % faster than 12 x 2
constexpr int tile_rows(int nv) { return (VL == 16 ? 24 : 12) / nv < 12 ? (VL == 16 ? 24 : 12) / nv : 12; }

// A[m][k] lies at a[m * row + k * step]; both orders occur. B has rows of ldb elements, C of ldc.
template <class E> struct Left { const E* data; int64_t row, step; };

template <class Kind, int MR, int NV, bool add>
static inline void tile(int64_t K, Left<typename Kind::E> a, const typename Kind::E* b, int64_t ldb,
                        typename Kind::C* c, int64_t ldc) {
  decltype(load(c)) sum[MR][NV] = {};
#pragma GCC unroll 4  // a loop this short leaves through a mispredicted branch otherwise
  for (int64_t k = 0; k < K; ++k) {
    decltype(load(b)) right[NV];
    for (int n = 0; n < NV; ++n) right[n] = load(b + n * VL);
    for (int m = 0; m < MR; ++m) {
      const auto left = a.data[m * a.row];
      for (int n = 0; n < NV; ++n) sum[m][n] = Kind::add_product(sum[m][n], right[n], left);
    }
    a.data += a.step;
    b += ldb;
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) {
      auto* to = c + m * ldc + n * VL;
      store(to, add ? load(to) + sum[m][n] : sum[m][n]);
    }
}

// All rows of one column strip; what is left over goes to tiles of half the height.
template <class Kind, int MR, int NV, bool add>
static inline void strip(int64_t M, int64_t K, Left<typename Kind::E> a, const typename Kind::E* b, int64_t ldb,
                         typename Kind::C* c, int64_t ldc) {
  for (; M >= MR; M -= MR, a.data += MR * a.row, c += MR * ldc) tile<Kind, MR, NV, add>(K, a, b, ldb, c, ldc);
  if constexpr (MR > 1)
    if (M > 0) strip<Kind, MR / 2, NV, add>(M, K, a, b, ldb, c, ldc);
}

// N = vectors * VL columns.
template <class Kind, bool add>
static void gemm(int64_t M, int64_t vectors, int64_t K, Left<typename Kind::E> a, const typename Kind::E* b,
                 int64_t ldb, typename Kind::C* c, int64_t ldc) {
  for (int64_t left = vectors; left > 0;) {  // one more than fit is halved: a single column is slow
    const int nv = left == kTileVectors + 1 ? int(left + 1) / 2 : left < kTileVectors ? int(left) : kTileVectors;
    if (nv == 4) strip<Kind, tile_rows(4), 4, add>(M, K, a, b, ldb, c, ldc);
    else if (nv == 3) strip<Kind, tile_rows(3), 3, add>(M, K, a, b, ldb, c, ldc);
    else if (nv == 2) strip<Kind, tile_rows(2), 2, add>(M, K, a, b, ldb, c, ldc);
    else strip<Kind, tile_rows(1), 1, add>(M, K, a, b, ldb, c, ldc);
    b += nv * VL, c += nv * VL, left -= nv;
  }
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
