// Small matrix products on operands that already lie in the caches: C[M,N] = or += A[M,K] B[K,N]. C is float32, A and B
// are too or, where the CPU multiplies them (DIFUSE_BF16_DOTS), pairs of bfloat16 along k, int32_t here; K counts pairs.
// The caller packs and blocks; here is only the register blocking. Each element of C is summed over k in order, in one
// chain, so its bits do not depend on how M and N were split.
#pragma once
#include "simd.h"

namespace difuse {
namespace DIFUSE_ISA {

// Rows of C held in registers beside NV vectors of columns: 12 accumulators of 16 registers, 24 of 32.
constexpr int kTileVectors = 3;
constexpr int tile_rows(int nv) { return (VL == 16 ? 24 : 12) / nv < 12 ? (VL == 16 ? 24 : 12) / nv : 12; }

// A[m][k] lies at a[m * row + k * step]; both orders occur. B has rows of ldb floats, C of ldc.
template <class E> struct Left { const E* data; int64_t row, step; };

static inline vf add_product(vf sum, vf right, float left) { return sum + right * left; }
#if defined(DIFUSE_BF16_DOTS)
static inline vf add_product(vf sum, vi right, int32_t left) { return dot(sum, right, vi{} + left); }
#endif

template <int MR, int NV, bool add, class E>
static inline void tile(int64_t K, Left<E> a, const E* b, int64_t ldb, float* c, int64_t ldc) {
  vf sum[MR][NV] = {};
#pragma GCC unroll 4  // a loop this short leaves through a mispredicted branch otherwise
  for (int64_t k = 0; k < K; ++k) {
    decltype(load(b)) right[NV];
    for (int n = 0; n < NV; ++n) right[n] = load(b + n * VL);
    for (int m = 0; m < MR; ++m) {
      const E left = a.data[m * a.row];
      for (int n = 0; n < NV; ++n) sum[m][n] = add_product(sum[m][n], right[n], left);
    }
    a.data += a.step;
    b += ldb;
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) {
      float* to = c + m * ldc + n * VL;
      store(to, add ? load(to) + sum[m][n] : sum[m][n]);
    }
}

// All rows of one column strip; what is left over goes to tiles of half the height.
template <int MR, int NV, bool add, class E>
static inline void strip(int64_t M, int64_t K, Left<E> a, const E* b, int64_t ldb, float* c, int64_t ldc) {
  for (; M >= MR; M -= MR, a.data += MR * a.row, c += MR * ldc) tile<MR, NV, add>(K, a, b, ldb, c, ldc);
  if constexpr (MR > 1)
    if (M > 0) strip<MR / 2, NV, add>(M, K, a, b, ldb, c, ldc);
}

// N = vectors * VL columns.
template <bool add, class E>
static void gemm(int64_t M, int64_t vectors, int64_t K, Left<E> a, const E* b, int64_t ldb, float* c, int64_t ldc) {
  for (int64_t left = vectors; left > 0;) {
    const int nv = left == 4 ? 2 : left > kTileVectors ? kTileVectors : int(left);  // 2 + 2 is faster than 3 + 1
    if (nv == 3) strip<tile_rows(3), 3, add>(M, K, a, b, ldb, c, ldc);
    else if (nv == 2) strip<tile_rows(2), 2, add>(M, K, a, b, ldb, c, ldc);
    else strip<tile_rows(1), 1, add>(M, K, a, b, ldb, c, ldc);
    b += nv * VL, c += nv * VL, left -= nv;
  }
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
