// A block of DiT on packed weights, contract in kernels/difuse_kernels/dit_block/dit_block.py. Five passes over the
// tokens, and nothing of Python between them: with cold caches that was 3 to 5 % of a forward.
#include <cmath>

#include "ops.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

const Tensor kNone;

// The `width` columns of rows from `begin` on.
Tensor columns(Tensor t, int64_t begin, int64_t width) {
  t.data += begin * (t.dtype == DType::f32 ? 4 : 2);
  t.size[t.ndim - 1] = width;
  return t;
}

// [M,D] as [B,S,H,D/H].
Tensor by_heads(const Tensor& t, int64_t B, int64_t heads) {
  const int64_t S = t.size[0] / B, width = t.size[1] / heads, row = t.stride[0];
  Tensor found = t;
  found.ndim = 4;
  const int64_t sizes[] = {B, S, heads, width}, strides[] = {S * row, row, width, 1};
  for (int i = 0; i < 4; ++i) found.size[i] = sizes[i], found.stride[i] = strides[i];
  return found;
}

struct Norm { Tensor scale, shift; float eps; };
struct Gated { Tensor gate, residual; };

// weight: a packed weight, its scale, sums and smoothing, and a bias; see `linear` in ops.h.
void product(const Tensor& x, const Tensor& x_scale, const Norm& norm, const TensorList& weight, const char* activation,
             const Gated& gated, const Tensor& next_smooth, const Tensor& out, const Tensor& out_scale) {
  const Tensor* w = weight.item;
  linear(x, x_scale, norm.scale, norm.shift, norm.eps, w[3], w[0], w[1], w[2], w[4], activation, gated.gate,
         gated.residual, next_smooth, out, out_scale);
}

}  // namespace

void dit_block(const Tensor& x, const Tensor& modulation, int64_t heads, float eps1, float eps2, const TensorList& qkv,
               const TensorList& k, const TensorList& v, const TensorList& proj, const TensorList& fc1,
               const char* activation, const TensorList& fc2, const Tensor& projected, const Tensor& attended,
               const Tensor& hidden, const Tensor& hidden_scale, const Tensor& out) {
  const int64_t B = modulation.size[0], D = x.size[1];
  if (x.size[0] == 0) return;
  const auto chunk = [&](int64_t i) { return columns(modulation, i * D, D); };  // shift, scale, gate of both halves
  const Norm norm = {chunk(1), chunk(0), eps1};
  if (k.n == 0) product(x, kNone, norm, qkv, "none", {}, kNone, projected, kNone);
  else
    for (int64_t i = 0; i < 3; ++i)
      product(x, kNone, norm, i == 0 ? qkv : i == 1 ? k : v, "none", {}, kNone, columns(projected, i * D, D), kNone);
  const auto part = [&](int64_t i) { return by_heads(columns(projected, i * D, D), B, heads); };
  attention_forward(part(0), part(1), part(2), kNone, kNone, float(1 / std::sqrt(double(D / heads))),
                    by_heads(attended, B, heads), kNone);
  product(attended, kNone, {}, proj, "none", {chunk(2), x}, kNone, out, kNone);
  const bool codes = hidden.dtype == DType::u8;
  product(out, kNone, {chunk(4), chunk(3), eps2}, fc1, activation, {}, codes ? fc2.item[3] : kNone, hidden,
          hidden_scale);
  product(hidden, hidden_scale, {}, fc2, "none", {chunk(5), out}, kNone, out, kNone);
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
