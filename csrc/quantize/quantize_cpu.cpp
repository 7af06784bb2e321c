// 8-bit codes of rows, and back, on the CPU. Contract in kernels/difuse_kernels/quantize/quantize.py.
//
//   v = act(x row_scale + bias) smooth          scale = max |v| / 127          code = round(v / scale) + 128
//   sums <- act(sums row_scale + bias)
#include <algorithm>
#include "../common/activations.h"
#include "../common/parallel.h"
#include "../common/rows.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kRows = 4;  // rows that share one scratch buffer

const float* floats(const Tensor& t) { return reinterpret_cast<const float*>(t.data); }

// act(x row_scale + bias), n of them.
template <class Act, class T> vf value(const T* x, float row_scale, const float* bias, int64_t i, int n) {
  vf v = get(x + i, n) * row_scale;
  if (bias) v += get(bias + i, n);
  return Act::value(v, nullptr);
}

// Codes of v [K], whose row's scale is returned: nan where v holds anything that is not finite.
float encode(const float* v, int64_t K, vf largest, vf probe, uint8_t* codes) {
  const float most = hmax(largest);
  const bool empty = !(most > 1e-35f);  // 127 / most must be finite
  const float inverse = empty ? 0.f : 127.f / most;
  each_vector(K, [&](int64_t i, int n) {
    // the magic number leaves the rounded sum in the lowest byte of the mantissa
    const vi bits = (vi)(get(v + i, n) * inverse + (0x1.8p23f + 128.f));
    const vb code = low_bytes(bits);
    if (n == VL) std::memcpy(codes + i, &code, VL);
    else for (int lane = 0; lane < n; ++lane) codes[i + lane] = code[lane];
  });
  return (empty ? 0.f : most / 127.f) + hsum(probe);
}

template <class Act, class T> void rows_to_codes(const Tensor& x, const Tensor& row_scale, const Tensor& bias,
                                                 const Tensor& smooth, const Tensor& codes, const Tensor& scale) {
  const int64_t M = x.size[0], K = x.size[1];
  parallel_for((M + kRows - 1) / kRows, kRows * K * 2, [&](int64_t block) {
    Scratch scratch(K);
    for (int64_t m = block * kRows; m < std::min(M, (block + 1) * kRows); ++m) {
      const T* from = at<T>(x, m);
      const float row = row_scale ? floats(row_scale)[m] : 1.f;
      vf largest = {}, probe = {};
      each_vector(K, [&](int64_t i, int n) {
        vf v = value<Act>(from, row, floats(bias), i, n);
        if (smooth) v *= get(floats(smooth) + i, n);
        v = first(v, n);
        put(scratch.data + i, v, n);
        largest = vmax(largest, v < 0.f ? -v : v);
        probe += v * 0.f;
      });
      reinterpret_cast<float*>(scale.data)[m] =
          encode(scratch.data, K, largest, probe, reinterpret_cast<uint8_t*>(codes.data) + m * K);
    }
  });
}

// Calls body(Act{}); the name was checked by the contract.
template <class F> void with_activation(const char* name, F body) {
  if (name[0] == 'n') body(Identity{});
  else if (name[4] == '_') body(GeluTanh{});
  else body(Gelu{});
}

}  // namespace

void quantize(const Tensor& x, const Tensor& row_scale, const Tensor& bias, const char* activation,
              const Tensor& smooth, const Tensor& codes, const Tensor& scale) {
  with_activation(activation, [&](auto act) {
    with_type(x.dtype, [&](auto type) {
      rows_to_codes<decltype(act), decltype(type)>(x, row_scale, bias, smooth, codes, scale);
    });
  });
}

void dequantize(const Tensor& sums, const Tensor& row_scale, const Tensor& bias, const char* activation) {
  const int64_t N = sums.size[1];
  with_activation(activation, [&](auto act) {
    parallel_for(sums.size[0], N, [&](int64_t m) {
      float* row = at<float>(sums, m);
      const float s = floats(row_scale)[m];
      each_vector(N, [&](int64_t i, int n) { put(row + i, value<decltype(act)>(row, s, floats(bias), i, n), n); });
    });
  });
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
