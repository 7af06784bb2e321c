// What group_norm_act's CPU kernels share: the layouts of an image, what a channel is computed with, sums.
#pragma once
#include "../common/parallel.h"
#include "../common/rows.h"
#include "../common/vector_math.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kRun = 4096;     // positions of one channel that are summed at a time: 16 KB, half of L1
constexpr int64_t kBlock = 16384;  // elements of a block of rows: 64 KB, in L2
constexpr int kTogether = 4;       // rows whose contributions are added in registers before touching memory

// [B,C,N] or, in channels_last, [B,N,C], in G groups of K channels.
struct Image {
  int64_t B, C, N = 1, G, K;
  Image(const Tensor& x, int64_t groups) : B(x.size[0]), C(x.size[1]), G(groups), K(x.size[1] / groups) {
    for (int d = 2; d < x.ndim; ++d) N *= x.size[d];
  }
  double count() const { return N ? double(K) * double(N) : 1.; }  // without elements all sums are zeros
  int64_t runs() const { return (N + kRun - 1) / kRun; }
  int64_t rows() const {  // of a block
    const int64_t most = kBlock / C / kTogether * kTogether;
    return most > kTogether ? most : kTogether;
  }
  int64_t blocks() const { return (N + rows() - 1) / rows(); }
};

float number(const Tensor& t, int64_t offset) {
  float found = 0;
  with_type(t.dtype, [&](auto type) { found = to_float(reinterpret_cast<const decltype(type)*>(t.data)[offset]); });
  return found;
}
float added(const Tensor& add, int64_t b, int64_t c) {
  return add ? number(add, b * add.stride[0] + c * add.stride[1]) : 0.f;
}

// What a channel of a sample is computed with: d = x - shift, z = d mul + bias.
struct Channels {
  float *shift, *mul, *bias;
  Channels(float* memory, int64_t n) : shift(memory), mul(memory + n), bias(memory + 2 * n) {}
  void set(int64_t at, int64_t b, int64_t c, const Tensor& add, const Tensor& w, const Tensor& bs, float mean,
           float rstd) const {
    shift[at] = mean - added(add, b, c);
    mul[at] = w ? rstd * number(w, c) : rstd;
    bias[at] = bs ? number(bs, c) : 0.f;
  }
};

// Sums of `terms` over n elements of one channel: term(i, n, sums) adds a vector to each.
template <int terms, class F> void run_sums(int64_t n, vf (&sums)[terms], F term) {
  vf s[4][terms] = {};  // chains, to hide the latency of the addition
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
    for (int k = 0; k < 4; ++k) term(i + k * VL, VL, s[k]);
  for (; i + VL <= n; i += VL) term(i, VL, s[0]);
  if (i < n) term(i, int(n - i), s[1]);
  for (int t = 0; t < terms; ++t) sums[t] = (s[0][t] + s[1][t]) + (s[2][t] + s[3][t]);
}

// n rows, some at a time: body(first row, how many, a constant).
template <class F> void by_rows(int64_t n, F body) {
  int64_t r = 0;
  for (; r + kTogether <= n; r += kTogether) body(r, std::integral_constant<int, kTogether>{});
  for (; r < n; ++r) body(r, std::integral_constant<int, 1>{});
}

// Calls the member for the layout, with the types.
template <class Pass> void run(const Pass& pass, DType dtype, bool silu, bool last) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (silu) last ? pass.template rows<T, true>() : pass.template planes<T, true>();
    else last ? pass.template rows<T, false>() : pass.template planes<T, false>();
  });
}

}  // namespace
}  // namespace DIFUSE_ISA
}  // namespace difuse
