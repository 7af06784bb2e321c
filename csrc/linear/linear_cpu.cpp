// out = residual + gate * act(h W^T + bias), h = LayerNorm(x) (1 + scale) + shift, W packed once; norm and gate may be
// absent. Contract in kernels/difuse_kernels/linear/linear.py.
//
// W [N,K] lies in panels of kVectors vectors of outputs, the last one perhaps narrower: [panel][K][output], elements
// of 32 bits along k as gemm.h multiplies them. A task is a block of rows times a range of panels. It brings its rows
// into W's form first, normed, rounded to bfloat16 or as codes with a scale per row, unless they come so; each tile of
// sums then goes, still in L1, through bias, activation and gate to the output. Where the output are codes, whose scale
// is the row's, the block's floats wait in L2 until its last panel.
#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "../common/activations.h"
#include "../common/codes.h"
#include "../common/gemm.h"
#include "../common/parallel.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int kVectors = 3;
constexpr int kPanel = kVectors * VL;
constexpr int kTile = tile_rows(kVectors);
// A sum of floats runs over so many of them in one go, as the libraries' do: one chain of 4608 would err three times as
// much. Beside what bfloat16 rounds that is nothing, and integers do not err.
constexpr int64_t kChain = 384;
constexpr int64_t kMostRows = 256;        // of a block: each panel, read from L3 or memory, serves them all
constexpr int64_t kOperandFloats = 1 << 19, kResultFloats = 1 << 18;  // of a block, in scratch: twice a common L2, one

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
const float* floats(const Tensor& t) { return reinterpret_cast<const float*>(t.data); }

// How M rows and the panels are divided among tasks. The bits do not depend on it.
struct Division {
  int64_t rows, blocks, ranges;  // of a block of rows, blocks of rows, ranges of panels
  // all_panels: a task must have all panels of its rows. Else at most four or so share rows, which each of them makes
  // operands of; that panels are read by one thread alone gains more.
  Division(int64_t M, int64_t panels, int64_t most_rows, bool all_panels) : ranges(1) {
    const int64_t threads = omp_get_max_threads();
    blocks = ceil_div(M, std::max<int64_t>(kTile, most_rows / kTile * kTile));
    if (all_panels) blocks = ceil_div(blocks, threads) * threads;
    while (4 * blocks < threads && M >= 128 * blocks) blocks *= 2;
    rows = std::max<int64_t>(kTile, ceil_div(ceil_div(M, blocks), kTile) * kTile);
    blocks = ceil_div(M, rows);
    if (!all_panels)
      while (ranges < panels && blocks * ranges % threads && blocks * ranges < 4 * threads) ++ranges;
  }
};

struct Arguments {
  const Tensor &x, &x_scale, &scale, &shift, &smooth, &weight, &weight_scale, &weight_sums, &bias, &gate, &residual,
      &next_smooth, &out, &out_scale;
  float eps;
  int64_t M() const { return x.size[0]; }
  int64_t K() const { return x.size[1]; }
  int64_t N() const { return out.size[1]; }
  int64_t tokens(const Tensor& modulation) const { return M() / modulation.size[0]; }  // of a sample
};

// A tile of sums, `vectors` wide, of the rows from m and the outputs from n on. act(sum + bias), and what is added to it,
// goes to rows of row_bytes at `to`. Sums of integers are scaled first, by the rows' `scales`.
template <class Act, class T, class C>
void finish(const Arguments& a, const C* c, const float* scales, int64_t m, int64_t rows, int64_t n, int vectors,
            char* to, int64_t row_bytes) {
  const float *gates[kTile], *residuals[kTile];
  if (a.gate) {
    int64_t b = m / a.tokens(a.gate), left = (b + 1) * a.tokens(a.gate) - m;  // rows of this sample
    for (int64_t r = 0; r < rows; ++r, --left) {
      if (left == 0) ++b, left = a.tokens(a.gate);
      gates[r] = at<float>(a.gate, b), residuals[r] = at<float>(a.residual, m + r);
    }
  }
  const auto strip = [&](const C* sums, int64_t n, int lanes) {
    const vf bias = a.bias ? get(floats(a.bias) + n, lanes) : vf{};
    const vf smooth = a.next_smooth ? get(floats(a.next_smooth) + n, lanes) : splat(1.f);
    [[maybe_unused]] vi zero;
    [[maybe_unused]] vf scale;
    if constexpr (std::is_same_v<C, int32_t>)
      zero = get(reinterpret_cast<const int32_t*>(a.weight_sums.data) + n, lanes),
      scale = get(floats(a.weight_scale) + n, lanes);
    for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
      vf y;
      if constexpr (std::is_same_v<C, int32_t>)
        y = __builtin_convertvector(load(sums) - zero, vf) * (scale * scales[r]) + bias;
      else y = load(sums) + bias;
      y = Act::value(y, nullptr);
      if (a.gate) y = get(residuals[r] + n, lanes) + get(gates[r] + n, lanes) * y;
      put(reinterpret_cast<T*>(to + r * row_bytes) + n, a.next_smooth ? y * smooth : y, lanes);
    }
  };
  for (int v = 0; v < vectors; ++v, n += VL, c += VL)
    if (n + VL <= a.N()) strip(c, n, VL);
    else strip(c, n, int(a.N() - n));
}
template <class C>
using Finish = void(const Arguments&, const C*, const float*, int64_t, int64_t, int64_t, int, char*, int64_t);

// Calls body(Act{}) for results of that dtype; the name was checked by the contract.
template <class F> void with_activation(const char* name, DType dtype, F body) {
  if (name[0] == 'n') body(Identity{});
  else if (name[4] == '_' && dtype != DType::f32) body(RoughGeluTanh{});
  else if (name[4] == '_') body(GeluTanh{});
  else body(Gelu{});
}

template <class Kind> struct Linear : Arguments {
  using E = typename Kind::E;
  using C = typename Kind::C;
  Finish<C>* finish;

  int64_t units() const { return ceil_div(K(), Kind::N); }
  int64_t operand_floats(int64_t rows) const { return ceil_div(rows * units(), VL) * VL; }
  bool to_codes() const { return out.dtype == DType::u8; }
  // Whether rows of x are operands where they lie.
  bool in_place() const {
    const DType native = Kind::N == 1 ? DType::f32 : Kind::N == 2 ? DType::bf16 : DType::u8;
    return x.dtype == native && !scale && K() % Kind::N == 0 && x.stride[0] % Kind::N == 0 &&
           reinterpret_cast<uintptr_t>(x.data) % 4 == 0;
  }

  // K numbers, value(i, n) each, as a row of an operand. Returns the row's scale.
  template <class F> float put_operand(E* to, F value) const {
    if constexpr (Kind::N == 4) {
      uint8_t* codes = reinterpret_cast<uint8_t*>(to);
      if (!smooth) return encode(K(), codes, value);
      return encode(K(), codes, [&](int64_t i, int n) { return value(i, n) * get(floats(smooth) + i, n); });
    } else {
      using T = std::conditional_t<Kind::N == 1, float, bf16>;
      each_vector(K(), [&](int64_t i, int n) { put(reinterpret_cast<T*>(to) + i, value(i, n), n); });
      return 1.f;
    }
  }

  // Row m of x, normed and modulated where that is asked for, as a row of an operand. Returns the row's scale.
  float bring(int64_t m, E* to) const {
    to[units() - 1] = 0;  // numbers beyond K, which are multiplied with zeros
    const char* row = x.data + m * x.stride[0] * element_size(x.dtype);
    if (x.dtype == DType::u8) {
      std::memcpy(to, row, K());
      return floats(x_scale)[m];
    }
    float row_scale = 1.f;
    with_type(x.dtype, [&](auto type) {
      const auto* p = reinterpret_cast<const decltype(type)*>(row);
      if (!scale) {
        row_scale = put_operand(to, [&](int64_t i, int n) { return get(p + i, n); });
        return;
      }
      const float mean = row_sum(K(), [&](int64_t i, int n) { return get(p + i, n); }) / float(K());
      const float variance = row_sum(K(), [&](int64_t i, int n) {
        const vf centred = first(get(p + i, n) - mean, n);
        return centred * centred;
      }) / float(K());
      const float rstd = 1.f / __builtin_sqrtf(variance + eps);
      const float *mul = at<float>(scale, m / tokens(scale)), *add = at<float>(shift, m / tokens(shift));
      row_scale = put_operand(to, [&](int64_t i, int n) {
        return (get(p + i, n) - mean) * rstd * (1.f + get(mul + i, n)) + get(add + i, n);
      });
    });
    return row_scale;
  }

  // Rows m to end, as many tiles as fit and then lower ones, of one panel.
  template <int MR, int NV>
  void panel(int64_t m, int64_t end, Left<E> left, const float* scales, const E* b, int64_t n, char* to,
             int64_t row_bytes) const {
    alignas(64) C c[MR * kPanel];
    for (; m + MR <= end; m += MR, left.data += MR * left.row, scales += MR, to += MR * row_bytes) {
      if (gate)  // what the sums are added to should be there when they are done
        for (int64_t r = 0; r < MR; ++r)
          for (int64_t i = 0; i < NV * VL; i += 16) __builtin_prefetch(at<float>(residual, m + r) + n + i);
      const int64_t chain = Kind::N == 1 ? std::min(kChain, units()) : units();
      tile<Kind, MR, NV, false>(chain, left, b, NV * VL, c, kPanel);
      for (int64_t k = chain; k < units(); k += chain)
        tile<Kind, MR, NV, true>(std::min(chain, units() - k), {left.data + k, left.row, 1}, b + k * NV * VL, NV * VL,
                                 c, kPanel);
      finish(*this, c, scales, m, MR, n, NV, to, row_bytes);
    }
    if constexpr (MR > 1)
      if (m < end) panel<MR / 2, NV>(m, end, left, scales, b, n, to, row_bytes);
  }

  // Panels first to last of rows begin to end.
  void block(int64_t begin, int64_t end, int64_t first, int64_t last, float* scratch) const {
    float *scales = scratch, *rows = scales + kMostRows, *results = rows + (in_place() ? 0 : operand_floats(end - begin));
    Left<E> left = {reinterpret_cast<const E*>(x.data) + begin * (x.stride[0] / Kind::N), x.stride[0] / Kind::N, 1};
    if (!in_place()) {
      E* to = reinterpret_cast<E*>(rows);
      for (int64_t m = begin; m < end; ++m) scales[m - begin] = bring(m, to + (m - begin) * units());
      left = {to, units(), 1};
    } else if (x_scale) {
      std::memcpy(scales, floats(x_scale) + begin, (end - begin) * 4);
    }
    const int64_t row_bytes = to_codes() ? N() * 4 : out.stride[0] * element_size(out.dtype);
    char* to = to_codes() ? reinterpret_cast<char*>(results) : out.data + begin * row_bytes;
    for (int64_t p = first; p < last; ++p) {
      const int64_t n = p * kPanel;
      const E* b = reinterpret_cast<const E*>(weight.data) + n * units();
      const int64_t vectors = std::min<int64_t>(kVectors, ceil_div(N() - n, VL));
      if (vectors == 3) panel<kTile, 3>(begin, end, left, scales, b, n, to, row_bytes);
      else if (vectors == 2) panel<kTile, 2>(begin, end, left, scales, b, n, to, row_bytes);
      else panel<kTile, 1>(begin, end, left, scales, b, n, to, row_bytes);
    }
    if (!to_codes()) return;
    for (int64_t m = begin; m < end; ++m, results += N())
      reinterpret_cast<float*>(out_scale.data)[m] =
          encode(N(), reinterpret_cast<uint8_t*>(out.data) + m * out.stride[0],
                 [&](int64_t i, int n) { return get(results + i, n); });
  }

  void run() const {
    if (M() == 0) return;
    const int64_t panels = ceil_div(N(), kPanel);
    int64_t most_rows = kMostRows;
    if (!in_place()) most_rows = std::min(most_rows, kOperandFloats / units());
    if (to_codes()) most_rows = std::min(most_rows, kResultFloats / N());
    const Division parts(M(), panels, most_rows, to_codes());
    const int64_t floats = kMostRows + (in_place() ? 0 : operand_floats(parts.rows)) + (to_codes() ? parts.rows * N() : 0);
    each_task(parts.blocks * parts.ranges, 2. * M() * N() * K(), floats, [&](int64_t i, float* scratch) {
      const int64_t begin = i % parts.blocks * parts.rows, range = i / parts.blocks;
      block(begin, std::min(M(), begin + parts.rows), range * panels / parts.ranges,
            (range + 1) * panels / parts.ranges, scratch);
    });
  }
};

}  // namespace

void linear(const Tensor& x, const Tensor& x_scale, const Tensor& scale, const Tensor& shift, float eps,
            const Tensor& smooth, const Tensor& weight, const Tensor& weight_scale, const Tensor& weight_sums,
            const Tensor& bias, const char* activation, const Tensor& gate, const Tensor& residual,
            const Tensor& next_smooth, const Tensor& out, const Tensor& out_scale) {
  const Arguments a{x,    x_scale, scale,    shift,       smooth, weight,    weight_scale, weight_sums,
                    bias, gate,    residual, next_smooth, out,    out_scale, eps};
  with_activation(activation, out.dtype, [&](auto act) {
    with_type(out.dtype == DType::u8 ? DType::f32 : out.dtype, [&](auto type) {
      using Act = decltype(act);
      using T = decltype(type);
      if (weight.dtype == DType::f32) Linear<Floats>{a, finish<Act, T, float>}.run();
      else if (weight.dtype == DType::bf16) Linear<Pairs>{a, finish<Act, T, float>}.run();
      else Linear<Quads>{a, finish<Act, T, int32_t>}.run();
    });
  });
}

void linear_layout(const Tensor& layout) {
  int32_t* to = reinterpret_cast<int32_t*>(layout.data);
  to[0] = kPanel, to[1] = VL, to[2] = kSaturates ? 64 : 127;  // 2 * 255 * 64 fits 16 bits
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
