// GroupNorm and activation on the CPU, contract in kernels/difuse_kernels/group_norm_act/group_norm_act.py.
//
//   u = x + add        xhat = (u - mean) rstd        z = xhat w + b        y = act(z)
//   add and mean become one number per channel:  d = x - (mean - add),  z = d (rstd w) + b
//
// Memory is read once for the statistics: a block that lies in the cache is summed, then its centred squares are, and
// the means and squares of all blocks are combined in their order, in double. Contiguous images: a task is a group of a
// sample, which the second reading finds in L2. channels_last: a task is a block of rows (positions) of a sample, and
// vectors run over channels. Blocks depend on the shape alone, so results depend neither on threads nor on the batch.
#include "group_norm_act_cpu.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

// Beyond |z| = 87 silu is 0 or z; a nan stays one.
template <bool silu> vf act(vf z) {
  if (!silu) return z;
  const vf least = vmax(splat(-87.f), z);
  return least / (1.f + exp_within(-vmin(splat(87.f), least)));
}

// A block's mean and centred squares, the rounding of the mean mended: error = sum of x - mean.
struct Moments {
  float mean, squares;
  Moments(float rough, float error, float about, float n)
      : mean(rough + error / n), squares(about - error * error / n) {}
};
// Of a group, from those of its blocks: n of them, entry(i, &elements, &mean, &squares).
template <class F> void group_moments(int64_t n, double count, float eps, F entry, float& mean, float& rstd) {
  double size, m, q, total = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) entry(i, size, m, q), total += size * m;
  const double centre = total / count;
  for (int64_t i = 0; i < n; ++i) entry(i, size, m, q), squares += q + size * (m - centre) * (m - centre);
  mean = float(centre);
  rstd = float(1. / __builtin_sqrt(squares / count + double(eps)));
}

struct Forward {
  const Image g;
  const Tensor &x, &add, &weight, &bias;
  float eps;
  const Tensor &y, &mean, &rstd;

  void keep(int64_t b, int64_t group, float m, float r) const {
    if (mean) at<float>(mean, b)[group] = m, at<float>(rstd, b)[group] = r;
  }

  template <class T, bool silu> void planes() const {
    parallel_for(g.B * g.G, g.K * g.N, [&](int64_t task) {
      const int64_t b = task / g.G, group = task % g.G, runs = g.runs(), begin = task * g.K * g.N;
      const T* xs = reinterpret_cast<const T*>(x.data) + begin;
      T* ys = reinterpret_cast<T*>(y.data) + begin;
      Scratch scratch(2 * g.K * runs + 3 * g.K);
      float* found = scratch.data;
      for (int64_t k = 0; k < g.K; ++k)
        for (int64_t r = 0; r < runs; ++r) {
          const T* from = xs + k * g.N + r * kRun;
          const int64_t n = size(r);
          vf sum[1], about[2];
          run_sums(n, sum, [&](int64_t i, int m, vf* s) { s[0] += get(from + i, m); });
          const float rough = hsum(sum[0]) / float(n);
          run_sums(n, about, [&](int64_t i, int m, vf* s) {
            const vf d = first(get(from + i, m) - rough, m);
            s[0] += d, s[1] += d * d;
          });
          const Moments moments(rough, hsum(about[0]), hsum(about[1]), float(n));
          found[2 * (k * runs + r)] = moments.mean + added(add, b, group * g.K + k);
          found[2 * (k * runs + r) + 1] = moments.squares;
        }
      float m, r;
      group_moments(g.K * runs, g.count(), eps, [&](int64_t i, double& n, double& at_mean, double& squares) {
        n = double(size(i % runs)), at_mean = found[2 * i], squares = found[2 * i + 1];
      }, m, r);
      keep(b, group, m, r);
      const Channels channels(found + 2 * g.K * runs, g.K);
      for (int64_t k = 0; k < g.K; ++k) {
        channels.set(k, b, group * g.K + k, add, weight, bias, m, r);
        const float shift = channels.shift[k], mul = channels.mul[k], beta = channels.bias[k];
        const T* from = xs + k * g.N;
        T* to = ys + k * g.N;
        each_vector(g.N, [&](int64_t i, int n) { put(to + i, act<silu>((get(from + i, n) - shift) * mul + beta), n); });
      }
    });
  }
  int64_t size(int64_t run) const { return run + 1 < g.runs() ? kRun : g.N - run * kRun; }

  template <class T, bool silu> void rows() const {
    const int64_t C = g.C, R = g.rows(), blocks = g.blocks();
    Scratch partial(g.B * blocks * 2 * C), parameters(g.B * 3 * C);  // per block, [2,C]: means, squares
    const auto height = [&](int64_t block) { return block + 1 < blocks ? R : g.N - block * R; };
    parallel_for(g.B * blocks, R * C, [&](int64_t task) {
      const int64_t n = height(task % blocks);
      const T* xs = reinterpret_cast<const T*>(x.data) + (task / blocks * g.N + task % blocks * R) * C;
      Scratch scratch(C);
      float *means = partial.data + task * 2 * C, *squares = means + C, *errors = scratch.data;
      std::memset(means, 0, 2 * C * 4);
      std::memset(errors, 0, C * 4);
      by_rows(n, [&](int64_t r, auto count) {
        each_vector(C, [&](int64_t i, int m) {
          vf sum = {};
          for (int k = 0; k < count; ++k) sum += get(xs + (r + k) * C + i, m);
          put(means + i, get(means + i, m) + sum, m);
        });
      });
      for (int64_t c = 0; c < C; ++c) means[c] /= float(n);
      by_rows(n, [&](int64_t r, auto count) {
        each_vector(C, [&](int64_t i, int m) {
          const vf rough = get(means + i, m);
          vf error = {}, square = {};
          for (int k = 0; k < count; ++k) {
            const vf d = get(xs + (r + k) * C + i, m) - rough;
            error += d, square += d * d;
          }
          put(errors + i, get(errors + i, m) + error, m), put(squares + i, get(squares + i, m) + square, m);
        });
      });
      for (int64_t c = 0; c < C; ++c) {
        const Moments moments(means[c], errors[c], squares[c], float(n));
        means[c] = moments.mean, squares[c] = moments.squares;
      }
    });
    parallel_for(g.B * g.G, blocks * g.K, [&](int64_t task) {
      const int64_t b = task / g.G, group = task % g.G;
      const float* found = partial.data + b * blocks * 2 * C + group * g.K;
      Scratch adds(g.K);
      for (int64_t k = 0; k < g.K; ++k) adds.data[k] = added(add, b, group * g.K + k);
      float m, r;
      group_moments(blocks * g.K, g.count(), eps, [&](int64_t i, double& n, double& at_mean, double& squares) {
        const float* entry = found + i / g.K * 2 * C + i % g.K;
        n = double(height(i / g.K)), at_mean = double(entry[0]) + adds.data[i % g.K], squares = entry[C];
      }, m, r);
      keep(b, group, m, r);
      const Channels channels(parameters.data + b * 3 * C, C);
      for (int64_t c = group * g.K; c < (group + 1) * g.K; ++c) channels.set(c, b, c, add, weight, bias, m, r);
    });
    parallel_for(g.B * blocks, R * C, [&](int64_t task) {
      const int64_t begin = (task / blocks * g.N + task % blocks * R) * C;
      const Channels channels(parameters.data + task / blocks * 3 * C, C);
      const T* xs = reinterpret_cast<const T*>(x.data) + begin;
      T* ys = reinterpret_cast<T*>(y.data) + begin;
      by_rows(height(task % blocks), [&](int64_t r, auto count) {
        each_vector(C, [&](int64_t i, int n) {
          const vf shift = get(channels.shift + i, n), mul = get(channels.mul + i, n), beta = get(channels.bias + i, n);
          for (int k = 0; k < count; ++k) {
            const int64_t at = (r + k) * C + i;
            put(ys + at, act<silu>((get(xs + at, n) - shift) * mul + beta), n);
          }
        });
      });
    });
  }
};

}  // namespace

void group_norm_act_forward(const Tensor& x, const Tensor& add, const Tensor& weight, const Tensor& bias,
                            int64_t groups, bool silu, float eps, bool last, const Tensor& y, const Tensor& mean,
                            const Tensor& rstd) {
  run(Forward{Image(x, groups), x, add, weight, bias, eps, y, mean, rstd}, x.dtype, silu, last);
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
