// patchify and unpatchify on GPUs, contract in kernels/difuse_kernels/patchify/patchify.py.
//
// A block moves a stripe through shared memory: neighbouring cells of one row of the grid, all channels or some. On the
// image side these are lines, one for each (channel, frame, row) inside the patch, on the token side whole tokens or
// runs of each. Both sides are contiguous, and move 16 bytes at a time where alignment and sizes allow it.
// The stripe lies in lines, an odd number of 16 bytes apart, and every eighth leaves 16 bytes more: lines 1, 2, 4, 8 ..
// apart, whose elements meet in one token, begin in different banks. A table, made once per block, says where the
// elements of a token lie; to divide for every element would cost more than to move it.
//
// Bytes to move: twice the image. At 4.3 TB/s [2,16,128,128] in bf16 takes 0.5 us, Wan's [1,16,21,60,104] 2 us. Four
// loads are under way for each of 128 threads. No size depends on B. Elements only move: they are integers here.
#include <algorithm>
#include <numeric>

#include "../common/cuda.h"

namespace difuse {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kStripe = 16 << 10, kShared = 48 << 10;  // bytes of a stripe aimed at; of shared memory at most
constexpr int64_t kNarrow = 64;                            // bytes of a line that are worth a stripe

struct Move {
  char *image, *tokens;
  int64_t image_b, image_c, image_f, image_h, token_b, token_s;  // strides in elements
  unsigned C, t, p, q, c_, K;                                    // sizes; the channel's stride in a token
  unsigned letter_size[4], letter_line[4];  // of a token, fastest first: size, lines from one to the next (q: none)
  unsigned cells_f, cells_h, cells_w;       // of the grid
  unsigned width, channels;                 // of a stripe
  unsigned across, deep;                    // stripes of a row of cells, of all channels
  unsigned group;                           // cells that together fill whole vectors of 16 bytes
  unsigned pitch;                           // of lines, in vectors
  unsigned image_bytes;                     // of an access on the image's side: 16, 4 or 2
  bool token_wide;                          // 16-byte accesses on the tokens' side
};

// Where line `line` of a stripe begins, in vectors.
template <class I> __host__ __device__ constexpr I line_start(I line, I pitch) { return line * pitch + line / 8; }

// Line and column of element `at` of a token, counted from its first channel.
__device__ __forceinline__ void place(const Move& k, unsigned at, unsigned& line, unsigned& column) {
  line = column = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned rest = i < 3 ? at / k.letter_size[i] : 0, digit = at - rest * k.letter_size[i];
    line += digit * k.letter_line[i];
    if (k.letter_line[i] == 0) column = digit;
    at = rest;
  }
}

// Which stripe a block does.
struct Stripe {
  int64_t image = 0, token = 0;  // offsets of its first elements
  unsigned cells, channels, lines;
  __device__ __forceinline__ explicit Stripe(const Move& k) {
    unsigned rest = blockIdx.x;
    const unsigned c = rest % k.deep * k.channels;
    rest /= k.deep;
    const unsigned w = rest % k.across * k.width;
    rest /= k.across;
    const unsigned row = rest % (k.cells_f * k.cells_h), f = row / k.cells_h * k.t, h = row % k.cells_h * k.p;
    const int64_t b = rest / (k.cells_f * k.cells_h);
    cells = min(k.width, k.cells_w - w), channels = min(k.channels, k.C - c), lines = channels * k.t * k.p;
    image = b * k.image_b + c * k.image_c + f * k.image_f + h * k.image_h + int64_t(w) * k.q;
    token = b * k.token_b + (int64_t(row) * k.cells_w + w) * k.token_s + int64_t(c) * k.c_;
  }
};

// Copies n things, number i from from(i) to to(i, it): four loads are under way before the first is stored.
template <class A, class From, class To> __device__ __forceinline__ void copy(unsigned n, From from, To to) {
  for (unsigned i = threadIdx.x; i < n; i += 4 * kThreads) {
    A value[4];
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (i + u * kThreads < n) value[u] = *from(i + u * kThreads);
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (i + u * kThreads < n) to(i + u * kThreads, value[u]);
  }
}

// The stripe against the image, by accesses of type A.
template <class A, class T, bool to_image>
__device__ __forceinline__ void image_side(const Move& k, const Stripe& stripe, T* shared) {
  const unsigned units = stripe.cells * k.q * sizeof(T) / sizeof(A);  // of a line
  const auto outside = [&](unsigned i) {
    const unsigned line = i / units, unit = i % units, row = line % k.p, frame = line / k.p % k.t, c = line / k.p / k.t;
    return reinterpret_cast<A*>(reinterpret_cast<T*>(k.image) + stripe.image + c * k.image_c + frame * k.image_f +
                                row * k.image_h) + unit;
  };
  const auto inside = [&](unsigned i) {
    return reinterpret_cast<A*>(shared + line_start(i / units, k.pitch) * kWide<T>) + i % units;
  };
  if constexpr (to_image) copy<A>(stripe.lines * units, inside, [&](unsigned i, const A& v) { *outside(i) = v; });
  else copy<A>(stripe.lines * units, outside, [&](unsigned i, const A& v) { *inside(i) = v; });
}

// The stripe against the tokens, by accesses of N elements. table: where the elements of a group of cells lie in the
// stripe, in their order on the tokens' side: `runs` runs of `run` elements.
template <int N, class T, bool to_image>
__device__ __forceinline__ void token_side(const Move& k, const Stripe& stripe, T* shared, const unsigned short* table,
                                           unsigned runs, unsigned run) {
  using A = std::conditional_t<N == 1, T, uint4>;
  struct alignas(2 * N) Places { unsigned short at[N]; };
  const unsigned units = runs * run / N;  // of a group of cells
  const auto outside = [&](unsigned i) {
    const unsigned element = i % units * N, outer = runs == 1 ? 0 : element / run;
    return reinterpret_cast<A*>(reinterpret_cast<T*>(k.tokens) + stripe.token + i / units * k.group * k.token_s +
                                int64_t(outer) * k.C * k.c_ + (element - outer * run));
  };
  const auto places = [&](unsigned i) { return *reinterpret_cast<const Places*>(table + i % units * N); };
  const auto cell = [&](unsigned i) { return shared + i / units * k.group * k.q; };
  const unsigned n = stripe.cells / k.group * units;
  if constexpr (to_image) {
    copy<A>(n, outside, [&](unsigned i, const A& value) {
      const Places to = places(i);
      T elements[N];
      memcpy(elements, &value, sizeof value);
#pragma unroll
      for (int e = 0; e < N; ++e) cell(i)[to.at[e]] = elements[e];
    });
  } else {
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const Places from = places(i);
      T elements[N];
#pragma unroll
      for (int e = 0; e < N; ++e) elements[e] = cell(i)[from.at[e]];
      A value;
      memcpy(&value, elements, sizeof value);
      *outside(i) = value;
    }
  }
}

template <class T, bool to_image> __global__ void __launch_bounds__(kThreads) stripes(const Move k) {
  DIFUSE_DYNAMIC_SHARED(memory);
  T* shared = reinterpret_cast<T*>(memory);
  const Stripe stripe(k);
  unsigned short* table = reinterpret_cast<unsigned short*>(shared + line_start(stripe.lines, k.pitch) * kWide<T>);

  // letters slower than the channel cut a stripe of some channels into runs
  const unsigned token = stripe.lines * k.q, whole = k.group * token;
  const unsigned run = stripe.channels == k.C ? whole : stripe.channels * k.c_, runs = whole / run;
  for (unsigned i = threadIdx.x; i < whole; i += kThreads) {
    const unsigned cell = i / token, element = i - cell * token, outer = runs == 1 ? 0 : element / run;
    unsigned line, column;
    place(k, element - outer * run + outer * k.C * k.c_, line, column);
    table[i] = static_cast<unsigned short>(line_start(line, k.pitch) * kWide<T> + cell * k.q + column);
  }
  const auto image = [&] {
    if (k.image_bytes == 16) image_side<uint4, T, to_image>(k, stripe, shared);
    else if (sizeof(T) == 4 || k.image_bytes == 4) image_side<unsigned, T, to_image>(k, stripe, shared);
    else image_side<T, T, to_image>(k, stripe, shared);
  };
  if (!to_image) image();
  __syncthreads();
  if (k.token_wide) token_side<kWide<T>, T, to_image>(k, stripe, shared, table, runs, run);
  else token_side<1, T, to_image>(k, stripe, shared, table, runs, run);
  if (!to_image) return;
  __syncthreads();
  image();
}

// Patches too large for shared memory, element by element. A block does one of a token's `blocks` parts.
template <class T, bool to_image>
__global__ void __launch_bounds__(kThreads) elements(const Move k, unsigned blocks) {
  const unsigned at = blockIdx.x % blocks * kThreads + threadIdx.x, token = blockIdx.x / blocks;
  if (at >= k.K) return;
  const unsigned w = token % k.cells_w, row = token / k.cells_w % (k.cells_f * k.cells_h);
  const int64_t b = token / k.cells_w / (k.cells_f * k.cells_h);
  unsigned line, column;
  place(k, at, line, column);
  const unsigned h = row % k.cells_h * k.p + line % k.p, f = row / k.cells_h * k.t + line / k.p % k.t;
  T* image = reinterpret_cast<T*>(k.image) + b * k.image_b + line / k.p / k.t * k.image_c + f * k.image_f +
             h * k.image_h + (int64_t(w) * k.q + column);
  T* to = reinterpret_cast<T*>(k.tokens) + b * k.token_b + (int64_t(row) * k.cells_w + w) * k.token_s + at;
  if constexpr (to_image) *image = *to;
  else *to = *image;
}

// --- the host --------------------------------------------------------------------------------------------------------
void read_order(Move& k, const char* order) {
  int at = 0;
  unsigned stride = 1;
  const auto letter = [&](unsigned size, unsigned lines) {
    k.letter_size[at] = size, k.letter_line[at++] = lines, stride *= size;
  };
  for (int i = int(std::strlen(order)) - 1; i >= 0; --i) {
    if (order[i] == 'c') k.c_ = stride, letter(k.C, k.t * k.p);
    else if (order[i] == 't') letter(k.t, k.p);
    else if (order[i] == 'p') letter(k.p, 1);
    else letter(k.q, 0);
  }
  if (at == 3) letter(1, 1);  // an image's frame
}

// Whether `bytes` at a time may be moved at both ends of every line of the image.
bool aligned(const Tensor& image, int64_t bytes) {
  const int64_t size = element_size(image.dtype), last = image.ndim - 1;
  if (reinterpret_cast<uintptr_t>(image.data) % bytes || image.size[last] * size % bytes) return false;
  for (int d = 0; d < last; ++d)
    if (image.size[d] > 1 && image.stride[d] * size % bytes) return false;
  return true;
}

int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// Chooses the stripes; the bytes of shared memory that one takes.
int64_t choose(Move& k, const Tensor& image, const Tensor& tokens) {
  const int64_t size = element_size(image.dtype), wide = 16 / size, K = k.K, C = k.C, cells_w = k.cells_w, q = k.q;
  k.image_bytes = unsigned(aligned(image, 16) ? 16 : aligned(image, 4) ? 4 : 2);
  const bool dense = tokens.stride[1] == K && reinterpret_cast<uintptr_t>(tokens.data) % 16 == 0 &&
                     (tokens.size[0] == 1 || tokens.stride[0] % wide == 0);
  k.token_wide = (wide_rows(tokens) && K % wide == 0) || (dense && cells_w * K % wide == 0);
  k.group = unsigned(k.token_wide ? wide / std::gcd(K, wide) : 1);

  const int64_t vector = k.image_bytes / size > 1 ? k.image_bytes / size : 1;
  const int64_t step = std::max<int64_t>(vector / std::gcd(q, vector), k.group);  // a stripe is a multiple of it wide
  const auto pitch = [&](int64_t cells) { return ceil_div(cells * q * size, 16) | 1; };
  int64_t width = std::min(cells_w, round_up(ceil_div(kNarrow / size, q), step)), channels = C;
  if (C * k.t * k.p * pitch(width) * 16 <= kStripe) {
    width = std::min(cells_w, std::max(width, kStripe / (K * size) / step * step));
    width = round_up(ceil_div(cells_w, ceil_div(cells_w, width)), step);
  } else {
    const int64_t least = k.token_wide ? wide / std::gcd<int64_t>(k.c_, wide) : 1;
    channels = std::max<int64_t>(kStripe / (k.t * k.p * pitch(width) * 16), 1);
    channels = std::min(C, round_up(ceil_div(C, ceil_div(C, channels)), least));
    if (channels < C && (k.group > 1 || C * k.c_ % wide)) k.token_wide = false, k.group = 1;
  }
  k.width = unsigned(width), k.channels = unsigned(channels), k.pitch = unsigned(pitch(width));
  k.across = unsigned(ceil_div(cells_w, width)), k.deep = unsigned(ceil_div(C, channels));
  const int64_t lines = channels * k.t * k.p;
  return line_start<int64_t>(lines, k.pitch) * 16 + round_up(k.group * lines * q * 2, 16);
}

template <class T, bool to_image> void run(Queue& queue, const Tensor& image, const Tensor& tokens, Move& k) {
  const char* name = to_image ? "unpatchify" : "patchify";
  const int64_t shared = choose(k, image, tokens), rows = image.size[0] * k.cells_f * k.cells_h;
  if (shared <= kShared) {
    launch(queue, name, stripes<T, to_image>, rows * k.across * k.deep, kThreads, size_t(shared), k);
  } else {
    const int64_t blocks = ceil_div(k.K, kThreads);
    launch(queue, name, elements<T, to_image>, rows * k.cells_w * blocks, kThreads, 0, k, unsigned(blocks));
  }
}

}  // namespace

void patchify(Queue& queue, const Tensor& image, const Tensor& tokens, int64_t t, int64_t p, int64_t q,
              const char* order, bool to_image) {
  if (!image || !tokens) return;  // no element
  const bool video = image.ndim == 5;
  const int64_t* size = image.size + image.ndim - 2;
  Move k;
  k.image = image.data, k.tokens = tokens.data;
  k.image_b = image.stride[0], k.image_c = image.stride[1], k.image_f = video ? image.stride[2] : 0;
  k.image_h = image.stride[image.ndim - 2], k.token_b = tokens.stride[0], k.token_s = tokens.stride[1];
  k.C = unsigned(image.size[1]), k.t = unsigned(t), k.p = unsigned(p), k.q = unsigned(q);
  k.K = unsigned(tokens.size[2]);
  k.cells_f = unsigned(video ? image.size[2] / t : 1), k.cells_h = unsigned(size[0] / p);
  k.cells_w = unsigned(size[1] / q);
  if (!k.K || !tokens.size[0] || !tokens.size[1]) return;
  read_order(k, order);
  if (element_size(image.dtype) == 4) {
    if (to_image) run<uint32_t, true>(queue, image, tokens, k);
    else run<uint32_t, false>(queue, image, tokens, k);
  } else {
    if (to_image) run<uint16_t, true>(queue, image, tokens, k);
    else run<uint16_t, false>(queue, image, tokens, k);
  }
}

}  // namespace cuda
}  // namespace difuse
