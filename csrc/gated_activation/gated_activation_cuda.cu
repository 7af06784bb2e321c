// Gated activations on GPUs, contract in kernels/difuse_kernels/gated_activation/gated_activation.py.
//
//   h = [a | b] along the last dimension; z is the half that is activated, l the other
//   out = l * act(z)          dl = dout * act(z)          dz = dout * l * act'(z)
//
// Bytes to move, bf16: 6 an element of the result forward, 10 backward; at 4.3 TB/s [2,1024,9216] 26 and 44 us. The
// bytes of an element forward take as long as to issue 40 instructions. It takes 29 (silu), 32 (gelu_tanh), 36 (gelu),
// 8 of which find the place and convert. For that a thread does 16 bytes of four rows, of two where that fills the
// registers (backward) or is not needed (float32): 64 to 128 bytes of loads under way. 128 threads do a tile of as many
// columns as leave the fewest lanes idle; finding it takes one 32-bit division, whatever the size.
// Sums of products are written as fmaf: the compiler has nothing to contract one way here and another way there, and
// the narrow path gives the wide path's bits.
#include "../common/cuda.h"

namespace difuse {
namespace cuda {
namespace {

constexpr int kThreads = 128;

enum Kind : int { kSilu, kGelu, kGeluTanh };

// What both directions take; strides count elements.
struct Gate {
  const char *h, *dout;  // dout: backward only
  char* to;              // out or dh, contiguous
  Kind kind;
  bool first;      // z is the first half
  int64_t rows, F;
  int width_bits;          // a tile is 2^width_bits accesses wide
  unsigned column_blocks;  // tiles side by side
  int ndim = 0;              // leading dimensions, merged, outermost first
  int64_t size[kMaxDims], h_stride[kMaxDims], dout_stride[kMaxDims];
};

// 1 / (1 + e^-x) and one minus it, without overflow or cancellation.
__device__ __forceinline__ void sigmoid(float x, float& value, float& rest) {
  const float e = expf(-fabsf(x)), large = __fdividef(1.f, 1.f + e), small = e * large;
  value = x < 0 ? small : large;
  rest = x < 0 ? large : small;
}

// act(z) and act'(z); what is not used is not compiled.
template <Kind kind> __device__ __forceinline__ void activate(float z, float& value, float& slope) {
  if constexpr (kind == kSilu) {
    float s, rest;
    sigmoid(z, s, rest);
    value = z * s;
    slope = s * fmaf(z, rest, 1.f);
  } else if constexpr (kind == kGelu) {
    const float cdf = fmaf(0.5f, erff(z * 0.707106781f), 0.5f);
    value = z * cdf;
    slope = fmaf(z, 0.398942280f * expf(-0.5f * z * z), cdf);  // 1 / sqrt(2 pi)
  } else {  // (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (z + 0.044715 z^3)
    const float square = z * z;
    float s, rest;
    sigmoid(z * fmaf(0.0713548163f, square, 1.59576912f), s, rest);
    value = z * s;
    slope = fmaf(z * s * rest, fmaf(0.214064449f, square, 1.59576912f), s);
  }
}

// N: elements of one access, 16 bytes of them or one.
template <int N, bool backward> constexpr int kRows = N == 4 || backward ? 2 : 4;  // a thread's

// Where row `row` begins in h and in dout.
__device__ __forceinline__ void offsets(const Gate& k, int64_t row, int64_t& h, int64_t& dout) {
  h = dout = 0;
#pragma unroll 1
  for (int d = k.ndim - 1; d > 0; --d) {
    const int64_t rest = divide(row, k.size[d]), index = row - rest * k.size[d];
    h += index * k.h_stride[d], dout += index * k.dout_stride[d];
    row = rest;
  }
  h += row * k.h_stride[0], dout += row * k.dout_stride[0];
}

// What follows the loads. A thread has rows first, first + step .. of the `rows` from which `to` points to its column.
template <Kind kind, bool backward, class T, int U, int N>
__device__ __forceinline__ void finish(const Gate& k, const float (&z)[U][N], const float (&l)[U][N],
                                       const float (&g)[U][N], T* to, int first, int step, int rows) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    float dz[N], dl[N];  // forward, out is in dl
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float value, slope;
      activate<kind>(z[u][i], value, slope);
      dl[i] = (backward ? g[u][i] : l[u][i]) * value;
      if (backward) dz[i] = g[u][i] * l[u][i] * slope;
    }
    const int row = first + u * step;
    if (row >= rows) return;
    T* at = to + row * (backward ? 2 * k.F : k.F);
    if constexpr (backward) store(at + (k.first ? 0 : k.F), dz);
    store(at + (backward && k.first ? k.F : 0), dl);
  }
}

template <class T, int N, bool backward> __global__ void __launch_bounds__(kThreads) gate(const Gate k) {
  constexpr int U = kRows<N, backward>;
  const unsigned row_block = blockIdx.x / k.column_blocks, column_block = blockIdx.x - row_block * k.column_blocks;
  const int step = kThreads >> k.width_bits, first = threadIdx.x >> k.width_bits;  // a thread's rows in the tile
  const int64_t top = int64_t(row_block) * (U * step);
  int rows = int(min(int64_t(U * step), k.rows - top));
  int64_t column = ((int64_t(column_block) << k.width_bits) + int(threadIdx.x) - (first << k.width_bits)) * N;
  if (column >= k.F) column = 0, rows = 0;  // lanes outside read what others read and write nothing

  int64_t h_offset[U], dout_offset[U];
#pragma unroll
  for (int u = 0; u < U; ++u)
    offsets(k, top + max(min(first + u * step, rows - 1), 0), h_offset[u], dout_offset[u]);
  float z[U][N], l[U][N], g[U][N];
#pragma unroll
  for (int u = 0; u < U; ++u) {  // no branch in between: the first would be converted before it
    const T* h = reinterpret_cast<const T*>(k.h) + h_offset[u] + column;
    load(z[u], h + (k.first ? 0 : k.F));
    load(l[u], h + (k.first ? k.F : 0));
    if (backward) load(g[u], reinterpret_cast<const T*>(k.dout) + dout_offset[u] + column);
  }
  T* to = reinterpret_cast<T*>(k.to) + top * (backward ? 2 * k.F : k.F) + column;
  if (k.kind == kSilu) finish<kSilu, backward>(k, z, l, g, to, first, step, rows);
  else if (k.kind == kGelu) finish<kGelu, backward>(k, z, l, g, to, first, step, rows);
  else finish<kGeluTanh, backward>(k, z, l, g, to, first, step, rows);
}

// The leading dimensions, merged where h and dout allow it.
void lead(Gate& k, const Tensor& h, const Tensor& dout) {
  for (int d = 0; d + 1 < h.ndim; ++d) {
    const int64_t n = h.size[d];
    k.rows *= n;
    if (n == 1) continue;
    const int last = k.ndim - 1;
    const bool merges = k.ndim && k.h_stride[last] == h.stride[d] * n && k.dout_stride[last] == dout.stride[d] * n;
    const int at = merges ? last : k.ndim++;
    k.size[at] = merges ? k.size[at] * n : n;
    k.h_stride[at] = h.stride[d], k.dout_stride[at] = dout.stride[d];
  }
  if (!k.ndim) k.size[0] = 1, k.h_stride[0] = k.dout_stride[0] = 0, k.ndim = 1;
}

// Of the widths 2^least .. kThreads the one that leaves the fewest lanes idle, the larger if it makes no odds.
int tile_bits(int64_t columns, int least) {
  int best = 7;
  static_assert(1 << 7 == kThreads, "");
  for (int bits = best; bits >= least; --bits)
    if (ceil_div(columns, 1 << bits) << bits < ceil_div(columns, 1 << best) << best) best = bits;
  return best;
}

template <class T, int N, bool backward> void run(Queue& queue, Gate k) {
  const int64_t columns = k.F / N;
  k.width_bits = tile_bits(columns, N == 1 ? 5 : 3);  // 128 bytes side by side are whole lines of the cache
  k.column_blocks = unsigned(ceil_div(columns, 1 << k.width_bits));
  const int64_t row_blocks = ceil_div(k.rows, (kThreads >> k.width_bits) * kRows<N, backward>);
  launch(queue, backward ? "gated_activation_backward" : "gated_activation_forward", gate<T, N, backward>,
         row_blocks * k.column_blocks, kThreads, 0, k);
}

template <bool backward>
void start(Queue& queue, const Tensor& h, const Tensor& dout, const char* activation, bool first, const Tensor& to) {
  Gate k;
  k.h = h.data, k.dout = dout.data, k.to = to.data, k.first = first;
  k.kind = activation[0] == 's' ? kSilu : activation[4] == '_' ? kGeluTanh : kGelu;  // the contract checked the name
  k.rows = 1, k.F = h.size[h.ndim - 1] / 2;
  lead(k, h, dout);
  if (k.rows == 0 || k.F == 0) return;
  const bool aligned = wide_rows(h) && wide_rows(dout) && wide_rows(to);
  with_type(h.dtype, [&](auto type) {
    using T = decltype(type);
    if (aligned && k.F % kWide<T> == 0) run<T, kWide<T>, backward>(queue, k);
    else run<T, 1, backward>(queue, k);
  });
}

}  // namespace

void gated_activation_forward(Queue& queue, const Tensor& h, const char* activation, bool first, const Tensor& out) {
  start<false>(queue, h, h, activation, first, out);
}

void gated_activation_backward(Queue& queue, const Tensor& dout, const Tensor& h, const char* activation, bool first,
                               const Tensor& dh) {
  start<true>(queue, h, dout, activation, first, dh);
}

}  // namespace cuda
}  // namespace difuse
