// The backward pass of qk_norm_rope on GPUs. With g the incoming gradient turned back, xhat = (x - mean) * rstd, and
// means over what one norm covers:
//   dx = rstd * (g w - mean(g w) - xhat * mean(g w xhat))      mean(g w) for LayerNorm only
//   dweight = sum of g xhat, dbias = sum of g                  over tokens, and heads unless the norm is over the token
// Statistics are computed again from x. A block takes a chunk of the tokens of one sample and leaves its sums for the
// parameters in scratch memory; sum_chunks adds them up in order. Chunks depend on tokens, heads and D, not on B.
//
// Memory bounds it: x and dout are read, dx is written. Flux's q and k [1,4608,24,128] of bfloat16: 170 MB and 5 MB of
// angles, 41 us at 4.3 TB/s. Norm over the head: a thread has 2 heads of x and dout under way, 128 bytes, 384 threads
// on a multiprocessor (168 registers) 48 KB. Norm over the token: the sums for the weights leave registers for one
// block only, which is why it fetches the next token before it works on this one.
#include "qk_norm_rope_cuda.h"

namespace difuse {
namespace cuda {
namespace {

using namespace qk;

// Heads of a thread. Under a norm over the token their sums for the weights are apart, so they are fewer.
template <class T, bool full> constexpr int kHeads = full ? 8 / kWide<T> : 2;
// Threads that hold a token, at most, by registers: float32 has two heads a thread, LayerNorm twice the sums.
template <class T> constexpr int token_threads(bool layer) {
  return sizeof(T) == 4 ? 384 : layer ? 256 : kTokenThreads;
}
constexpr int kSteps = 4, kTokenSteps = 16;  // at most, of a block through its chunk
constexpr int kChunks = 64;                  // of a sample, before a block takes a second step
constexpr int kColumns = 8, kSumRows = 32;   // of a block of `sum_chunks`: 32 bytes of a row at a time

struct Part {
  Heads dout, x, dx;
  Parameter weight;
  float *dweight, *dbias;  // [B * blocks, width], or nullptr
  int64_t chunk;           // tokens
  int64_t width;           // of a weight
};

struct Backward {
  Part part[2];
  Rows rows[2];
  Angles angles;
  Layout layout;
  bool layer;
  float eps;
  unsigned blocks = 0;  // of a sample
};

// The block's sums, of the threads that hold the same place of a head, to their row.
template <class T>
__device__ void store_sums(float* row, const float (&sum)[2][kWide<T>], const Place& place, const Layout& layout,
                           float* shared) {
  constexpr int W = kWide<T>;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, D = layout.D;
  float v[2][W];
#pragma unroll
  for (int i = 0; i < 2 * W; ++i) v[i / W][i % W] = sum[i / W][i % W];
  for (int w = layout.lanes; w < kWarp; w *= 2) {
#pragma unroll
    for (int i = 0; i < 2 * W; ++i) v[i / W][i % W] += __shfl_xor_sync(kAll, v[i / W][i % W], w);
  }
  __syncthreads();  // the last sums have been read
  if (lane < layout.lanes) {
    float* row = shared + warp * D;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      if (place.first_there) row[place.first + i] = v[0][i];
      if (place.second_there) row[place.second + i] = v[1][i];
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < D; i += kGroupThreads) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < kGroupThreads / kWarp; ++w) all += shared[w * D + i];
    row[i] = all;
  }
}

template <class T, bool full, bool layer>
__global__ void __launch_bounds__(full ? token_threads<T>(layer) : kGroupThreads, full ? 1 : 3)
    backward_wide(const Backward k) {
  constexpr int W = kWide<T>, U = kHeads<T, full>;
  alignas(16) __shared__ float shared[full ? kWarp : kGroupThreads / kWarp * 2 * kWarp * W];
  const int64_t b = blockIdx.x / k.blocks;
  unsigned block = blockIdx.x % k.blocks;
  const int i = block >= k.rows[0].blocks;
  block -= i * k.rows[0].blocks;
  const Part& part = k.part[i];
  const Rows& rows = k.rows[i];
  const Place place = Place::of<T>(k.layout, k.angles);

  const int64_t begin = block * part.chunk, left = rows.tokens - begin;
  const int tokens = int(left < part.chunk ? left : part.chunk), slots = rows.slots;
  const int group = int(threadIdx.x) >> k.layout.shift, groups = int(blockDim.x) >> k.layout.shift;
  const int steps = full ? tokens : (tokens * slots + groups - 1) / groups;

  float of_weight[full ? U : 1][2][W] = {}, of_bias[full ? U : 1][2][W] = {}, weight[2][W];
  if (!full) {
    parameter(weight[0], part.weight, place.first, place.first_there, 1);
    parameter(weight[1], part.weight, place.second, place.second_there, 1);
  }
  struct Raw {
    bool there[U];
    uint4 x[U][2], dout[U][2];
  };
  const auto fetch_step = [&](int step) {
    Raw raw;
    const int item = step * groups + group, token = full ? step : item / slots, slot = full ? group : item % slots;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int h = slot + u * slots;
      const bool there = raw.there[u] = token < tokens && slot < slots && h < rows.heads;
      const T *x = part.x.at<T>(b, begin + token, h), *dout = part.dout.at<T>(b, begin + token, h);
      raw.x[u][0] = fetch(x + place.first, there && place.first_there);
      raw.x[u][1] = fetch(x + place.second, there && place.second_there);
      raw.dout[u][0] = fetch(dout + place.first, there && place.first_there);
      raw.dout[u][1] = fetch(dout + place.second, there && place.second_there);
    }
    return raw;
  };
  Raw next;
  if (full) next = fetch_step(0);
  for (int step = 0; step < steps; ++step) {
    const int item = step * groups + group, token = full ? step : item / slots, slot = full ? group : item % slots;
    const int64_t s = begin + token;
    const Raw now = full ? next : fetch_step(step);
    if (full) next = fetch_step(step + 1);  // one block fills a multiprocessor: none beside it hides its waiting
    float cos[W], sin[W], mean[U], rstd[U], g[U][2][W], along[U], across[U];
    const bool turns = k.angles.rope != kNone && now.there[0];
    if (turns) lane_angles(cos, sin, k.angles, b, s, slot, place);
    statistics<T, full>(now.x, now.there, place, k.layout, layer, rows.share, k.eps, shared, mean, rstd);

    const auto xhat = [&](int u, int part, float (&to)[W]) {
      unpack<T>(to, now.x[u][part]);
#pragma unroll
      for (int n = 0; n < W; ++n) to[n] = (to[n] - mean[u]) * rstd[u];
    };
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int h = slot + u * slots;
      unpack<T>(g[u][0], now.dout[u][0]);
      unpack<T>(g[u][1], now.dout[u][1]);
      if (turns && now.there[u]) {
        if (full && u > 0 && k.angles.per_head) lane_angles(cos, sin, k.angles, b, s, h, place);
        turn(g[u], cos, sin, k.angles.rope);
      }
      along[u] = across[u] = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[W];
        xhat(u, half, v);
        if (full)
          parameter(weight[half], part.weight, int64_t(h) * k.layout.D + (half ? place.second : place.first),
                    now.there[u] && (half ? place.second_there : place.first_there), 1);
#pragma unroll
        for (int n = 0; n < W; ++n) {
          of_weight[full ? u : 0][half][n] += g[u][half][n] * v[n];
          if (layer) of_bias[full ? u : 0][half][n] += g[u][half][n];
          g[u][half][n] *= weight[half][n];
          along[u] += g[u][half][n] * v[n];
          if (layer) across[u] += g[u][half][n];
        }
      }
    }
    if (!part.dx.data) continue;  // the same in all threads
    total<full>(along, k.layout.lanes, shared);
    if (layer) total<full>(across, k.layout.lanes, shared);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!now.there[u]) continue;
      T* row = part.dx.at<T>(b, s, slot + u * slots);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[W];
        xhat(u, half, v);
#pragma unroll
        for (int n = 0; n < W; ++n)
          v[n] = rstd[u] * (g[u][half][n] - across[u] * rows.share - v[n] * (along[u] * rows.share));
        if (half ? place.second_there : place.first_there) store(row + (half ? place.second : place.first), v);
      }
    }
  }

  const int64_t row = (b * rows.blocks + block) * part.width;
  if constexpr (!full) {
    if (part.dweight) store_sums<T>(part.dweight + row, of_weight[0], place, k.layout, shared);
    if (layer && part.dbias) store_sums<T>(part.dbias + row, of_bias[0], place, k.layout, shared);
  } else {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int h = group + u * slots;
      if (group >= slots || h >= rows.heads) continue;
      const int64_t at = row + int64_t(h) * k.layout.D;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half ? !place.second_there : !place.first_there) continue;
        const int64_t to = at + (half ? place.second : place.first);
        if (part.dweight) store(part.dweight + to, of_weight[u][half]);
        if (layer && part.dbias) store(part.dbias + to, of_bias[u][half]);
      }
    }
  }
}

// A block: a chunk of one sample, one head or token at a time.
template <class T> __global__ void __launch_bounds__(kPlainToken) backward_plain(const Backward k, bool full) {
  __shared__ float shared[2 * kWarp];
  const int64_t b = blockIdx.x / k.blocks, D = k.layout.D;
  unsigned block = blockIdx.x % k.blocks;
  const int i = block >= k.rows[0].blocks;
  block -= i * k.rows[0].blocks;
  const Part& part = k.part[i];
  const Rows& rows = k.rows[i];
  const int together = full ? rows.heads : 1;
  const int64_t begin = block * part.chunk, end = begin + part.chunk < rows.tokens ? begin + part.chunk : rows.tokens;
  const int64_t sums = (b * rows.blocks + block) * part.width, n = together * D;
  for (int64_t e = threadIdx.x; e < n; e += blockDim.x) {  // a thread always has the same elements
    if (part.dweight) part.dweight[sums + e] = 0;
    if (part.dbias) part.dbias[sums + e] = 0;
  }
  for (int64_t s = begin; s < end; ++s) {
    for (int first = 0; first < rows.heads; first += together) {
      const auto x = [&](int64_t e) { return to_float(part.x.at<T>(b, s, first + e / D)[e % D]); };
      const auto gradient = [&](int64_t e) {
        const T* row = part.dout.at<T>(b, s, first + e / D);
        return turned(k.angles, b, s, first + e / D, int(e % D), [&](int64_t d) { return to_float(row[d]); });
      };
      const auto weight = [&](int64_t e) {
        return part.weight.data ? element(part.weight.data, part.weight.dtype, e) : 1;
      };
      float mean, rstd, sum[2] = {0, 0};
      statistics(n, k.layer, rows.share, k.eps, shared, mean, rstd, x);
      for (int64_t e = threadIdx.x; e < n; e += blockDim.x) {
        const float g = gradient(e), xhat = (x(e) - mean) * rstd;
        sum[0] += g * weight(e) * xhat;
        if (k.layer) sum[1] += g * weight(e);
        if (part.dweight) part.dweight[sums + e] += g * xhat;
        if (part.dbias) part.dbias[sums + e] += g;
      }
      if (!part.dx.data) continue;
      block_sum(sum, shared);
      for (int64_t e = threadIdx.x; e < n; e += blockDim.x) {
        const float xhat = (x(e) - mean) * rstd;
        from_float(part.dx.at<T>(b, s, first + e / D)[e % D],
                   rstd * (gradient(e) * weight(e) - sum[1] * rows.share - xhat * (sum[0] * rows.share)));
      }
    }
  }
}

struct Sum {
  const float* from = nullptr;  // [rows, width]
  char* to = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, width = 0;
  unsigned blocks = 0;
};
struct Sums {
  Sum sum[4];
};

__global__ void __launch_bounds__(kColumns* kSumRows) sum_chunks(const Sums k) {
  __shared__ float shared[kSumRows][kColumns];
  unsigned block = blockIdx.x;
  int i = 0;
  while (block >= k.sum[i].blocks) block -= k.sum[i++].blocks;
  const Sum& sum = k.sum[i];
  const int x = int(threadIdx.x) % kColumns, y = int(threadIdx.x) / kColumns;
  const int64_t column = int64_t(block) * kColumns + x;
  float all = 0;
  if (column < sum.width) {
#pragma unroll 16
    for (int64_t row = y; row < sum.rows; row += kSumRows) all += sum.from[row * sum.width + column];
  }
  shared[y][x] = all;
  __syncthreads();
  if (y > 0 || column >= sum.width) return;
  float v[1] = {0};
#pragma unroll
  for (int row = 0; row < kSumRows; ++row) v[0] += shared[row][x];
  store(sum.to, sum.dtype, column, v);
}

}  // namespace

void qk_norm_rope_backward(Queue& queue, const TensorList& dout, const TensorList& x, const TensorList& weight,
                           const Tensor& cos, const Tensor& sin, bool layer_norm, bool full, bool interleaved,
                           float eps, const TensorList& dx, const TensorList& dweight, const TensorList& dbias) {
  const char* name = "qk_norm_rope_backward";
  const int64_t B = x.item[0].size[0], D = x.item[0].size[3];
  const Angles angles(cos, sin, interleaved, -1);
  with_type(x.item[0].dtype, [&](auto type) {
    using T = decltype(type);
    Backward k{{}, {}, angles, Layout(D, kWide<T>, angles), layer_norm, eps};
    bool wide = true;
    for (int i = 0; i < 2; ++i) {
      if (!given(dout.item[i])) continue;
      Part& part = k.part[i];
      part.dout = Heads(dout.item[i]), part.x = Heads(x.item[i]), part.weight = Parameter(weight.item[i]);
      if (given(dx.item[i])) part.dx = Heads(dx.item[i]);
      k.rows[i] = Rows(x.item[i], full, full ? kHeads<T, true> : angles.per_head ? 1 : kHeads<T, false>);
      wide = wide && wide_rows(dout.item[i]) && wide_rows(x.item[i]) && wide_rows(dx.item[i]) && k.rows[i].fits();
    }
    const int threads = wide ? wide_threads(k.rows, full, k.layout, token_threads<T>(layer_norm)) : 0;
    Sums sums;
    unsigned sum_blocks = 0;
    for (int i = 0; i < 2; ++i) {
      if (!given(dout.item[i])) continue;
      Part& part = k.part[i];
      Rows& rows = k.rows[i];
      // A step takes a token, or as many heads as the block holds. A chunk is a token at least.
      const bool by_token = full || !threads;
      const int64_t at_once = by_token ? 1 : threads / k.layout.lanes, slots = by_token || !rows.slots ? 1 : rows.slots;
      const int64_t most = by_token ? kTokenSteps : kSteps, steps = rows.tokens * slots / (at_once * kChunks);
      part.chunk = ceil_div((steps < 1 ? 1 : steps > most ? most : steps) * at_once, slots);
      part.width = (full ? rows.heads : 1) * D;
      rows.blocks = unsigned(ceil_div(rows.tokens, part.chunk));
      k.blocks += rows.blocks;
      const auto sum = [&](const Tensor& to, Sum& sum) -> float* {
        if (!given(to)) return nullptr;
        sum.rows = B * rows.blocks, sum.width = part.width, sum.to = to.data, sum.dtype = to.dtype;
        sum_blocks += sum.blocks = unsigned(ceil_div(part.width, kColumns));
        float* from = queue.scratch(sum.rows * sum.width);
        sum.from = from;
        return from;
      };
      part.dweight = sum(dweight.item[i], sums.sum[2 * i]);
      part.dbias = sum(dbias.item[i], sums.sum[2 * i + 1]);
    }
    const auto start = [&](auto kernel) { launch(queue, name, kernel, B * k.blocks, threads, 0, k); };
    if (!threads) launch(queue, name, backward_plain<T>, B * k.blocks, full ? kPlainToken : kPlainHead, 0, k, full);
    else if (full) start(layer_norm ? backward_wide<T, true, true> : backward_wide<T, true, false>);
    else start(layer_norm ? backward_wide<T, false, true> : backward_wide<T, false, false>);
    launch(queue, name, sum_chunks, sum_blocks, kColumns * kSumRows, 0, sums);
  });
}

}  // namespace cuda
}  // namespace difuse
