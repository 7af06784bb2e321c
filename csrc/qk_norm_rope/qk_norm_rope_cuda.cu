// Query-key norm and rotary embedding on GPUs, contract in kernels/difuse_kernels/qk_norm_rope/qk_norm_rope.py. One
// launch for q, k and v; who holds what is told in qk_norm_rope_cuda.h.
//
// Memory bounds it: every element is read and written once. Flux's q, k and v [1,4608,24,128] of bfloat16: 85 MB in,
// 85 MB out, 5 MB of angles (its tables hold each twice), 175 MB or 41 us at 4.3 TB/s. A thread has 3 heads of 2 x 16
// bytes under way: 512 threads on a multiprocessor (128 registers) ask for 48 KB where 22 KB keep the memory busy.
// Angles and weights, which cost a thread as many instructions as a head does, are fetched once for the 3 heads.
#include "qk_norm_rope_cuda.h"

namespace difuse {
namespace cuda {
namespace {

using namespace qk;

constexpr int kHeads = 3, kTokenHeads = 2;  // of a thread, under a norm over the head or the token

struct Part {
  Heads x, out;
  Parameter weight, bias;
};

struct Forward {
  Part part[3];
  Rows rows[3];
  Angles angles;
  Layout layout;
  int norm;
  float eps;
  unsigned blocks = 0;  // of a sample
};

template <class T, bool full>
__global__ void __launch_bounds__(full ? kTokenThreads : kGroupThreads, full ? 1 : 4) forward_wide(const Forward k) {
  constexpr int W = kWide<T>, U = full ? kTokenHeads : kHeads;
  __shared__ float shared[kWarp];
  const int64_t b = blockIdx.x / k.blocks;
  unsigned block = blockIdx.x % k.blocks;
  int i = 0;
  while (block >= k.rows[i].blocks) block -= k.rows[i++].blocks;
  const Part& part = k.part[i];
  const Rows& rows = k.rows[i];
  const Place place = Place::of<T>(k.layout, k.angles);

  const unsigned group = threadIdx.x >> k.layout.shift, groups = blockDim.x >> k.layout.shift;
  const unsigned item = block * groups + group, slots = unsigned(rows.slots);
  const bool of_token = full && i < 2;  // the block has one token
  const int64_t s = of_token ? block : item / slots;
  const int slot = int(of_token ? group : item % slots);
  const T* x_row = part.x.at<T>(b, s, slot);
  T* out_row = part.out.at<T>(b, s, slot);
  const int64_t x_step = slots * part.x.h, out_step = slots * part.out.h;
  bool there[U];
  uint4 x[U][2];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    there[u] = s < rows.tokens && slot < rows.slots && slot + u * rows.slots < rows.heads;
    x[u][0] = fetch(x_row + u * x_step + place.first, there[u] && place.first_there);
    x[u][1] = fetch(x_row + u * x_step + place.second, there[u] && place.second_there);
  }
  if (i == 2) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      T* row = out_row + u * out_step;
      if (there[u] && place.first_there) *reinterpret_cast<uint4*>(row + place.first) = x[u][0];
      if (there[u] && place.second_there) *reinterpret_cast<uint4*>(row + place.second) = x[u][1];
    }
    return;
  }

  float weight[2][W], cos[W], sin[W], mean[U], rstd[U];
  if (!full) {
    parameter(weight[0], part.weight, place.first, place.first_there, 1);
    parameter(weight[1], part.weight, place.second, place.second_there, 1);
  }
  const bool turns = k.angles.rope != kNone && there[0];
  if (turns) lane_angles(cos, sin, k.angles, b, s, slot, place);
  if (k.norm) statistics<T, full>(x, there, place, k.layout, k.norm == 2, rows.share, k.eps, shared, mean, rstd);

#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (u >= rows.each) break;  // the same in all threads
    const int h = slot + u * rows.slots;
    if (!there[u]) continue;
    const int64_t from = full ? int64_t(h) * k.layout.D : 0;
    float v[2][W];
    unpack<T>(v[0], x[u][0]);
    unpack<T>(v[1], x[u][1]);
    if (k.norm) {
      if (full) {
        parameter(weight[0], part.weight, from + place.first, place.first_there, 1);
        parameter(weight[1], part.weight, from + place.second, place.second_there, 1);
      }
#pragma unroll
      for (int n = 0; n < 2 * W; ++n) v[n / W][n % W] = (v[n / W][n % W] - mean[u]) * rstd[u] * weight[n / W][n % W];
      if (part.bias.data) {
        float bias[2][W];
        parameter(bias[0], part.bias, from + place.first, place.first_there, 0);
        parameter(bias[1], part.bias, from + place.second, place.second_there, 0);
#pragma unroll
        for (int n = 0; n < 2 * W; ++n) v[n / W][n % W] += bias[n / W][n % W];
      }
    }
    if (turns) {
      if (full && u > 0 && k.angles.per_head) lane_angles(cos, sin, k.angles, b, s, h, place);
      turn(v, cos, sin, k.angles.rope);
    }
    T* row = out_row + u * out_step;
    if (place.first_there) store(row + place.first, v[0]);
    if (place.second_there) store(row + place.second, v[1]);
  }
}

// A block: one token of q, k or v, head by head or whole.
template <class T> __global__ void __launch_bounds__(kPlainToken) forward_plain(const Forward k, bool full) {
  __shared__ float shared[kWarp];
  const int64_t b = blockIdx.x / k.blocks, D = k.layout.D;
  unsigned s = blockIdx.x % k.blocks;
  int i = 0;
  while (s >= k.rows[i].blocks) s -= k.rows[i++].blocks;
  const Part& part = k.part[i];
  const Rows& rows = k.rows[i];
  const int together = full ? rows.heads : 1;
  for (int first = 0; first < rows.heads; first += together) {
    float mean = 0, rstd = 1;
    const auto x = [&](int64_t n) { return to_float(part.x.at<T>(b, s, first + n / D)[n % D]); };
    if (k.norm && i < 2)
      statistics(together * D, k.norm == 2, rows.share, k.eps, shared, mean, rstd, x);
    for (int64_t n = threadIdx.x; n < together * D; n += blockDim.x) {
      const int64_t head = n / D * D;
      const auto normed = [&](int64_t d) {
        const float w = part.weight.data ? element(part.weight.data, part.weight.dtype, head + d) : 1;
        const float v = (x(head + d) - mean) * rstd * w;
        return part.bias.data ? v + element(part.bias.data, part.bias.dtype, head + d) : v;
      };
      T* to = part.out.at<T>(b, s, first + n / D) + n % D;
      if (i == 2) *to = part.x.at<T>(b, s, first + n / D)[n % D];
      else from_float(*to, turned(k.angles, b, s, first + n / D, int(n % D), normed));
    }
  }
}

}  // namespace

void qk_norm_rope_forward(Queue& queue, const TensorList& x, const TensorList& out, const TensorList& weight,
                          const TensorList& bias, const Tensor& cos, const Tensor& sin, int norm, bool full,
                          bool interleaved, bool inverse, float eps) {
  const Tensor& some = given(x.item[0]) ? x.item[0] : x.item[1];
  if (!given(some)) return;
  full = full && norm;
  const int64_t B = some.size[0], D = some.size[3];
  const Angles angles(cos, sin, interleaved, inverse ? -1.f : 1.f);
  with_type(some.dtype, [&](auto type) {
    using T = decltype(type);
    Forward k{{}, {}, angles, Layout(D, kWide<T>, angles), norm, eps};
    bool wide = true;
    for (int i = 0; i < x.n; ++i) {
      if (!given(x.item[i])) continue;
      k.part[i].x = Heads(x.item[i]), k.part[i].out = Heads(out.item[i]);
      if (i < 2) k.part[i].weight = Parameter(weight.item[i]), k.part[i].bias = Parameter(bias.item[i]);
      k.rows[i] = Rows(x.item[i], full, full ? kTokenHeads : angles.per_head ? 1 : kHeads);
      wide = wide && wide_rows(x.item[i]) && wide_rows(out.item[i]) && k.rows[i].fits();
    }
    const int threads = wide ? wide_threads(k.rows, full, k.layout, kTokenThreads) : 0;
    for (int i = 0; i < 3; ++i) {
      Rows& rows = k.rows[i];
      const bool of_token = !threads || (full && i < 2);
      rows.blocks = unsigned(of_token ? rows.heads ? rows.tokens : 0
                                      : ceil_div(rows.tokens * rows.slots, threads / k.layout.lanes));
      k.blocks += rows.blocks;
    }
    const char* name = "qk_norm_rope_forward";
    if (!threads)
      launch(queue, name, forward_plain<T>, B * k.blocks, full ? kPlainToken : kPlainHead, 0, k, full);
    else if (full)
      launch(queue, name, forward_wide<T, true>, B * k.blocks, threads, 0, k);
    else
      launch(queue, name, forward_wide<T, false>, B * k.blocks, threads, 0, k);
  });
}

}  // namespace cuda
}  // namespace difuse
