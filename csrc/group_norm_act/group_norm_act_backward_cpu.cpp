// group_norm_act's backward on the CPU, with d, xhat and z of the forward:
//
//   dz = dy act'(z)    c1 = sum w dz / M, c2 = sum w dz xhat / M over the M elements of a group
//   dx = rstd (w dz - c1 - xhat c2)    dadd = sum_n dx    dw = sum_bn dz xhat    db = sum_bn dz
//
// Tasks and blocks are the forward's; sums of blocks are combined in their order, in double.
#include "group_norm_act_cpu.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

// act'(z). Beyond |z| = 87 silu's is 0 or 1; a nan stays one.
template <bool silu> vf slope(vf z) {
  if (!silu) return splat(1.f);
  const vf inner = vmin(splat(87.f), vmax(splat(-87.f), z)), e = exp_within(-inner), s = 1.f / (1.f + e);
  return s + (e * s) * (s * inner);  // e s is at most 1, e z would overflow
}

void put_number(const Tensor& t, int64_t offset, double value) {
  with_type(t.dtype, [&](auto type) {
    from_float(float(value), reinterpret_cast<decltype(type)*>(t.data)[offset]);
  });
}

struct Backward {
  const Image g;
  const Tensor &dy, &x, &add, &weight, &bias, &mean, &rstd, &dx, &dadd;
  double* sums;  // [B,C,2]: sum_n dz, sum_n dz xhat, for dweight and dbias

  // One vector: what the three sums of its channel gain. d is zero where there is no element.
  template <bool silu> static vf term(vf grad, vf d, vf mul, vf beta, vf& dz, vf& dzd, vf& ds) {
    const vf z_grad = grad * slope<silu>(d * mul + beta);
    dz += z_grad, dzd += z_grad * d, ds += d;
    return z_grad;
  }
  // From a group's sums [K,3] of dz, dz d, d per channel: k1 and k2 of dx = mul dz - k1 - d k2; writes dadd and sums.
  void group(int64_t b, int64_t number_of, const double* found, float& k1, float& k2) const {
    const double r = at<float>(rstd, b)[number_of], count = g.count();
    double c1 = 0, c2 = 0;
    for (int64_t k = 0; k < g.K; ++k) {
      const int64_t c = number_of * g.K + k;
      const double w = weight ? number(weight, c) : 1.f;
      c1 += w * found[3 * k], c2 += w * found[3 * k + 1];
      sums[2 * (b * g.C + c)] = found[3 * k], sums[2 * (b * g.C + c) + 1] = found[3 * k + 1] * r;
    }
    c1 *= r / count, c2 *= r * r * r / count;
    k1 = float(c1), k2 = float(c2);
    if (!dadd) return;
    for (int64_t k = 0; k < g.K; ++k) {
      const int64_t c = number_of * g.K + k;
      const double w = weight ? number(weight, c) : 1.f;
      put_number(dadd, b * g.C + c, w * r * found[3 * k] - double(g.N) * c1 - found[3 * k + 2] * c2);
    }
  }

  template <class T, bool silu> void planes() const {
    parallel_for(g.B * g.G, 2 * g.K * g.N, [&](int64_t task) {
      const int64_t b = task / g.G, group_number = task % g.G, begin = task * g.K * g.N;
      const T *xs = reinterpret_cast<const T*>(x.data) + begin, *grads = reinterpret_cast<const T*>(dy.data) + begin;
      Scratch scratch(3 * g.K + 6 * g.K + 16), scratch_of_dz(silu && !(sizeof(T) == 4 && dx) ? g.K * g.N : 0);
      const Channels channels(scratch.data, g.K);
      // dz is kept for the second reading: in dx, or in scratch where that has not the digits
      float* dz = sizeof(T) == 4 && dx ? reinterpret_cast<float*>(dx.data) + begin : scratch_of_dz.data;
      double* found = reinterpret_cast<double*>(scratch.data + (3 * g.K + 15) / 16 * 16);
      const float m = at<float>(mean, b)[group_number], r = at<float>(rstd, b)[group_number];
      for (int64_t k = 0; k < g.K; ++k) {
        channels.set(k, b, group_number * g.K + k, add, weight, bias, m, r);
        const float shift = channels.shift[k], mul = channels.mul[k], beta = channels.bias[k];
        double* total = found + 3 * k;
        total[0] = total[1] = total[2] = 0;
        for (int64_t start = 0; start < g.N; start += kRun) {
          const T *from = xs + k * g.N + start, *grad = grads + k * g.N + start;
          vf run[3];
          run_sums(g.N - start < kRun ? g.N - start : kRun, run, [&](int64_t i, int n, vf* s) {
            const vf d = first(get(from + i, n) - shift, n);
            const vf z_grad = term<silu>(get(grad + i, n), d, splat(mul), splat(beta), s[0], s[1], s[2]);
            if (silu) put(dz + k * g.N + start + i, z_grad, n);
          });
          for (int t = 0; t < 3; ++t) total[t] += double(hsum(run[t]));
        }
      }
      float k1, k2;
      group(b, group_number, found, k1, k2);
      if (!dx) return;
      for (int64_t k = 0; k < g.K; ++k) {
        const float shift = channels.shift[k], mul = channels.mul[k];
        const T *from = xs + k * g.N, *grad = grads + k * g.N;
        T* to = reinterpret_cast<T*>(dx.data) + begin + k * g.N;
        const float* kept = dz + k * g.N;
        each_vector(g.N, [&](int64_t i, int n) {
          const vf z_grad = silu ? get(kept + i, n) : get(grad + i, n);
          put(to + i, z_grad * mul - k1 - (get(from + i, n) - shift) * k2, n);
        });
      }
    });
  }

  template <class T, bool silu> void rows() const {
    const int64_t C = g.C, R = g.rows(), blocks = g.blocks();
    Scratch partial(g.B * blocks * 3 * C), parameters(g.B * 5 * C);  // parameters [B,5,C]: Channels, k1, k2
    const auto height = [&](int64_t block) { return block + 1 < blocks ? R : g.N - block * R; };
    parallel_for(g.B, 3 * C, [&](int64_t b) {
      const Channels channels(parameters.data + b * 5 * C, C);
      for (int64_t c = 0; c < C; ++c)
        channels.set(c, b, c, add, weight, bias, at<float>(mean, b)[c / g.K], at<float>(rstd, b)[c / g.K]);
    });
    parallel_for(g.B * blocks, 2 * R * C, [&](int64_t task) {
      const int64_t begin = (task / blocks * g.N + task % blocks * R) * C;
      const T *xs = reinterpret_cast<const T*>(x.data) + begin, *grads = reinterpret_cast<const T*>(dy.data) + begin;
      const Channels channels(parameters.data + task / blocks * 5 * C, C);
      float* total = partial.data + task * 3 * C;
      std::memset(total, 0, 3 * C * 4);
      by_rows(height(task % blocks), [&](int64_t r, auto count) {
        each_vector(C, [&](int64_t i, int n) {
          const vf shift = get(channels.shift + i, n), mul = get(channels.mul + i, n), beta = get(channels.bias + i, n);
          vf dz = {}, dzd = {}, ds = {};
          for (int k = 0; k < count; ++k)
            term<silu>(get(grads + (r + k) * C + i, n), get(xs + (r + k) * C + i, n) - shift, mul, beta, dz, dzd, ds);
          put(total + i, get(total + i, n) + dz, n), put(total + C + i, get(total + C + i, n) + dzd, n);
          put(total + 2 * C + i, get(total + 2 * C + i, n) + ds, n);
        });
      });
    });
    parallel_for(g.B * g.G, blocks * g.K * 3, [&](int64_t task) {
      const int64_t b = task / g.G, group_number = task % g.G;
      Scratch scratch(6 * g.K);
      double* found = reinterpret_cast<double*>(scratch.data);
      for (int64_t i = 0; i < 3 * g.K; ++i) found[i] = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        const float* from = partial.data + (b * blocks + block) * 3 * C + group_number * g.K;
        for (int64_t k = 0; k < g.K; ++k)
          for (int t = 0; t < 3; ++t) found[3 * k + t] += double(from[t * C + k]);
      }
      float k1, k2;
      group(b, group_number, found, k1, k2);
      float* to = parameters.data + b * 5 * C + 3 * C + group_number * g.K;
      for (int64_t k = 0; k < g.K; ++k) to[k] = k1, to[C + k] = k2;
    });
    if (!dx) return;
    parallel_for(g.B * blocks, 2 * R * C, [&](int64_t task) {
      const int64_t begin = (task / blocks * g.N + task % blocks * R) * C, end = begin + height(task % blocks) * C;
      const T *xs = reinterpret_cast<const T*>(x.data), *grads = reinterpret_cast<const T*>(dy.data);
      const Channels channels(parameters.data + task / blocks * 5 * C, C);
      const float *k1 = channels.bias + C, *k2 = k1 + C;
      for (int64_t row = begin; row < end; row += C)
        each_vector(C, [&](int64_t i, int n) {
          const vf d = get(xs + row + i, n) - get(channels.shift + i, n), mul = get(channels.mul + i, n);
          const vf dz = get(grads + row + i, n) * slope<silu>(d * mul + get(channels.bias + i, n));
          put(reinterpret_cast<T*>(dx.data) + row + i, dz * mul - get(k1 + i, n) - d * get(k2 + i, n), n);
        });
    });
  }

  // Samples in order.
  void parameters(const Tensor& dweight, const Tensor& dbias) const {
    for (int64_t c = 0; c < g.C; ++c) {
      double db = 0, dw = 0;
      for (int64_t b = 0; b < g.B; ++b) db += sums[2 * (b * g.C + c)], dw += sums[2 * (b * g.C + c) + 1];
      if (dweight) put_number(dweight, c, dw);
      if (dbias) put_number(dbias, c, db);
    }
  }
};

}  // namespace

void group_norm_act_backward(const Tensor& dy, const Tensor& x, const Tensor& add, const Tensor& weight,
                             const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t groups, bool silu,
                             bool last, const Tensor& dx, const Tensor& dadd, const Tensor& dweight,
                             const Tensor& dbias) {
  const Image g(x, groups);
  Scratch scratch(4 * g.B * g.C);
  const Backward pass{g, dy, x, add, weight, bias, mean, rstd, dx, dadd, reinterpret_cast<double*>(scratch.data)};
  run(pass, x.dtype, silu, last);
  pass.parameters(dweight, dbias);
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
