// What adaln's CPU kernels share: operands with a row per sample or per token, and their fold into a product and a sum.
#pragma once
#include "../common/parallel.h"
#include "../common/rows.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

// A task is kRows consecutive tokens of one sample: modulation rows are converted once per task, and sums over tokens are
// taken task by task and then in task order, so that results depend neither on the thread count nor on the other samples
// of the batch.
constexpr int64_t kRows = 32;

int64_t tasks_per_sample(int64_t S) { return S ? (S + kRows - 1) / kRows : 1; }  // none: sums are still zeros

const Tensor kNone;

// A modulation operand: absent, one row per sample [B,D], or one per token [B,S,D]; `table` [D] is added to every row.
struct Rows {
  const Tensor &t, &table;
  Rows(const Tensor& rows, const Tensor& added = kNone) : t(rows), table(added) {}
  bool per_token() const { return t && t.ndim == 3; }
  char* row(int64_t b, int64_t s) const {
    const int64_t offset = b * t.stride[0] + (t.ndim == 3 ? s * t.stride[1] : 0);
    return t.data + offset * element_size(t.dtype);
  }
  void read(float* to, int64_t b, int64_t s, int64_t D) const {
    load_row(to, row(b, s), t.dtype, D);
    if (!table) return;
    with_type(table.dtype, [&](auto type) {
      const auto* added = reinterpret_cast<const decltype(type)*>(table.data);
      each_vector(D, [&](int64_t i, int n) { put(to + i, get(to + i, n) + get(added + i, n), n); });
    });
  }
};

// mul = w (1 + scale), add = b (1 + scale) + shift; absent operands are 1, 0, 0, 0.
struct Modulation {
  Rows scale, shift, weight, bias;
  bool per_token() const { return scale.per_token() || shift.per_token(); }
  void read_one_plus_scale(float* to, int64_t b, int64_t s, int64_t D) const {
    if (scale.t) scale.read(to, b, s, D);
    for (int64_t i = 0; i < D; ++i) to[i] = scale.t ? 1.f + to[i] : 1.f;
  }
  void fold(float* mul, float* add, float* scratch, int64_t b, int64_t s, int64_t D) const {
    read_one_plus_scale(mul, b, s, D);
    if (shift.t) shift.read(add, b, s, D);
    else std::memset(add, 0, D * 4);
    if (bias.t) {
      load_row(scratch, bias.t.data, bias.t.dtype, D);
      for (int64_t i = 0; i < D; ++i) add[i] += scratch[i] * mul[i];
    }
    if (weight.t) {
      load_row(scratch, weight.t.data, weight.t.dtype, D);
      for (int64_t i = 0; i < D; ++i) mul[i] *= scratch[i];
    }
  }
};

template <class F> void with_types(DType x, DType y, F body) {
  with_type(x, [&](auto tx) { with_type(y, [&](auto ty) { body(tx, ty); }); });
}

}  // namespace
}  // namespace DIFUSE_ISA
}  // namespace difuse
