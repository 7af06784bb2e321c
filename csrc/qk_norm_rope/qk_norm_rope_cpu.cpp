// Query-key norm and rotary embedding on the CPU, contract in kernels/difuse_kernels/qk_norm_rope/qk_norm_rope.py.
//
// A task is kTokens consecutive tokens of one sample, all their heads of q, k and v. A token's angles are spread over
// whole vectors once and serve q and k. Statistics take two passes over a row in L1, again in the backward
// pass. Sums for the gradients of weights go task by task into `partial`, then in order of sample and task, so that
// results do not depend on the thread count.
#include <type_traits>
#include "../common/parallel.h"
#include "../common/rows.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

constexpr int64_t kTokens = 32;
constexpr int64_t kTogether = 16;  // tasks added up before they are added to the rest: short sums round less

enum Rope { kNone, kInterleaved, kHalf };

template <class T> T* head(const Tensor& t, int64_t b, int64_t s, int64_t h) {
  return at<T>(t, b, s) + h * t.stride[2];
}
bool given(const Tensor& t) { return t.ndim != 0; }  // an empty tensor has no data either
int64_t widest(const TensorList& parts, bool full) {  // row of a weight
  const auto heads = [&](int i) { return given(parts.item[i]) ? parts.item[i].size[2] : 0; };
  const int64_t most = heads(0) < heads(1) ? heads(1) : heads(0);
  return (full ? most : 1) * parts.item[given(parts.item[0]) ? 0 : 1].size[3];
}

int64_t tasks_per_sample(const TensorList& parts) {
  int64_t tasks = 1;  // without tokens too: the sums are still zeros
  for (int i = 0; i < parts.n; ++i) {
    const int64_t needed = given(parts.item[i]) ? (parts.item[i].size[1] + kTokens - 1) / kTokens : 0;
    tasks = tasks < needed ? needed : tasks;
  }
  return tasks;
}
int64_t elements(const TensorList& parts) {  // of one token
  int64_t n = 0;
  for (int i = 0; i < parts.n; ++i) n += parts.item[i].size[2] * parts.item[i].size[3];
  return n;
}

// cos and sin of one token. Interleaved: a row of D, cos twice per pair, -sin and +sin, then 1 and 0 for what does not
// turn. Half: a row of P. `sign` -1 turns back.
struct Angles {
  const Tensor &cos, &sin;
  bool interleaved;
  float sign;
  int64_t D;
  int64_t pairs() const { return given(cos) ? cos.size[cos.ndim - 1] : 0; }
  Rope rope() const { return !pairs() ? kNone : interleaved ? kInterleaved : kHalf; }
  int64_t rows() const { return cos.ndim == 4 ? cos.size[2] : 1; }
  int64_t scratch() const { return 2 * rows() * D + 1; }
  const float* of_head(const float* spread, int64_t h) const { return spread + (cos.ndim == 4 ? 2 * h * D : 0); }

  template <class F> void each(const Tensor& t, int64_t b, int64_t s, int64_t h, F body) const {
    const int64_t P = pairs(), step = t.stride[t.ndim - 1];
    const int64_t offset = (t.ndim > 2 ? b * t.stride[0] : 0) + s * t.stride[t.ndim > 2] +
                           (t.ndim == 4 ? h * t.stride[2] : 0);
    with_type(t.dtype, [&](auto type) {
      const auto* p = reinterpret_cast<const decltype(type)*>(t.data) + offset;
      if (step == 1) for (int64_t i = 0; i < P; ++i) body(i, to_float(p[i]));
      else for (int64_t i = 0; i < P; ++i) body(i, to_float(p[i * step]));
    });
  }
  void spread(float* to, int64_t b, int64_t s) const {
    for (int64_t h = 0; h < rows() && pairs(); ++h, to += 2 * D) {
      float *c = to, *d = to + D;
      if (!interleaved) {
        each(cos, b, s, h, [&](int64_t i, float a) { c[i] = a; });
        each(sin, b, s, h, [&](int64_t i, float a) { d[i] = sign * a; });
        continue;
      }
      each(cos, b, s, h, [&](int64_t i, float a) { c[2 * i] = c[2 * i + 1] = a; });
      each(sin, b, s, h, [&](int64_t i, float a) { d[2 * i] = -sign * a, d[2 * i + 1] = sign * a; });
      for (int64_t i = 2 * pairs(); i < D; ++i) c[i] = 1, d[i] = 0;
    }
  }
};

// give(i, v, n) for the vectors of a turned row whose vectors are take(i, n).
template <Rope rope, class Take, class Give>
void rotate(int64_t D, int64_t P, const float* c, const float* s, Take take, Give give) {
  if (rope == kHalf) {
    each_vector(P, [&](int64_t i, int n) {
      const vf a = take(i, n), b = take(P + i, n), cos = get(c + i, n), sin = get(s + i, n);
      give(i, a * cos - b * sin, n);
      give(P + i, b * cos + a * sin, n);
    });
    each_vector(D - 2 * P, [&](int64_t i, int n) { give(2 * P + i, take(2 * P + i, n), n); });
  } else {
    each_vector(D, [&](int64_t i, int n) {
      const vf v = take(i, n);
      give(i, rope == kInterleaved ? v * get(c + i, n) + swapped<1>(v) * get(s + i, n) : v, n);
    });
  }
}

template <class F> float row_sum(int64_t D, F term) {
  vf a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * VL <= D; i += 2 * VL) a += term(i, VL), b += term(i + VL, VL);
  for (; i + VL <= D; i += VL) a += term(i, VL);
  if (i < D) b += term(i, int(D - i));
  return hsum(a + b);
}

// Mean (0 for RMSNorm) and 1 / deviation over `heads` rows of D.
template <class T, bool layer>
void statistics(const T* x, int64_t stride, int64_t heads, int64_t D, float eps, float& m, float& r) {
  float sum = 0, squares = 0;
  if (layer)
    for (int64_t h = 0; h < heads; ++h) sum += row_sum(D, [&](int64_t i, int n) { return get(x + h * stride + i, n); });
  m = sum / float(heads * D);
  for (int64_t h = 0; h < heads; ++h)
    squares += row_sum(D, [&](int64_t i, int n) {
      const vf v = layer ? first(get(x + h * stride + i, n) - m, n) : get(x + h * stride + i, n);
      return v * v;
    });
  r = 1.f / __builtin_sqrtf(squares / float(heads * D) + eps);
}

// A weight or bias row in float32; ones or zeros where it is absent.
const float* read_parameter(float* to, const Tensor& t, int64_t n, float absent) {
  if (given(t)) load_row(to, t.data, t.dtype, n);
  else for (int64_t i = 0; i < n; ++i) to[i] = absent;
  return to;
}

struct Forward {
  const TensorList &x, &out, &weight, &bias;
  Angles angles;
  bool normed, full;
  float eps;
  int64_t W;  // the widest row of a weight

  template <class T, bool layer, Rope rope> void task(int64_t b, int64_t chunk) const {
    Scratch scratch(angles.scratch() + 4 * W);
    float *w = scratch.data, *offset = w + 2 * W, *spread = offset + 2 * W;
    for (int part = 0; part < 2; ++part) {
      if (!given(x.item[part])) continue;
      const int64_t row = full ? x.item[part].size[2] * angles.D : angles.D;
      read_parameter(w + part * W, weight.item[part], row, 1);
      if (layer) read_parameter(offset + part * W, bias.item[part], row, 0);
    }
    for (int64_t s = chunk * kTokens; s < (chunk + 1) * kTokens; ++s) {
      bool spreads = true;  // for the first part that has this token
      for (int part = 0; part < x.n; ++part) {
        if (!given(x.item[part]) || s >= x.item[part].size[1]) continue;
        if (part == 2) {
          copy<T>(x.item[part], out.item[part], b, s);
          continue;
        }
        if (spreads) angles.spread(spread, b, s);
        spreads = false;
        token<T, layer, rope>(x.item[part], out.item[part], b, s, w + part * W, offset + part * W, spread);
      }
    }
  }

  template <class T> void copy(const Tensor& in, const Tensor& to, int64_t b, int64_t s) const {
    for (int64_t h = 0; h < in.size[2]; ++h)
      std::memcpy(head<T>(to, b, s, h), head<T>(in, b, s, h), in.size[3] * sizeof(T));
  }

  template <class T, bool layer, Rope rope>
  void token(const Tensor& in, const Tensor& to, int64_t b, int64_t s, const float* w, const float* offset,
             const float* spread) const {
    const int64_t D = angles.D, H = in.size[2], group = full ? H : 1;
    float m = 0, r = 1;
    for (int64_t h = 0; h < H; ++h) {
      const T* xs = head<T>(in, b, s, h);
      T* ys = head<T>(to, b, s, h);
      if (normed && h % group == 0) statistics<T, layer>(xs, in.stride[2], group, D, eps, m, r);
      const int64_t first = full ? h * D : 0;
      const float* c = angles.of_head(spread, h);
      rotate<rope>(D, angles.pairs(), c, c + D, [&](int64_t i, int n) {
        const vf v = (layer ? get(xs + i, n) - m : get(xs + i, n)) * r * get(w + first + i, n);
        return layer ? v + get(offset + first + i, n) : v;
      }, [&](int64_t i, vf v, int n) { put(ys + i, v, n); });
    }
  }
};

struct Backward {
  const TensorList &dout, &x, &weight;
  Angles angles;
  bool full;
  float eps;
  const TensorList &dx, &dweight, &dbias;
  float* partial;  // [B, tasks, part, 2, W]: sums over the task's tokens of g*xhat and g; nullptr where none is wanted
  int64_t W;       // the widest row of a weight

  float* sums(int64_t task, int part) const { return partial + (task * 2 + part) * 2 * W; }

  template <class T, bool layer, Rope rope> void task(int64_t b, int64_t task) const {
    const int64_t chunk = task % tasks_per_sample(x);
    Scratch scratch(angles.scratch() + 5 * W);
    float *w = scratch.data, *g = w + 2 * W, *rows = g + W, *spread = rows + 2 * W;
    for (int part = 0; part < 2; ++part) {
      if (partial) std::memset(sums(task, part), 0, 2 * W * 4);
      if (given(dout.item[part]))
        read_parameter(w + part * W, weight.item[part], full ? x.item[part].size[2] * angles.D : angles.D, 1);
    }
    for (int64_t s = chunk * kTokens; s < (chunk + 1) * kTokens; ++s) {
      bool spreads = true;
      for (int part = 0; part < 2; ++part) {
        if (!given(dout.item[part]) || s >= x.item[part].size[1]) continue;
        if (spreads) angles.spread(spread, b, s);
        spreads = false;
        if (partial) std::memset(rows, 0, 2 * W * 4);
        token<T, layer, rope>(part, b, s, w + part * W, spread, g, rows);
        if (!partial) continue;
        float* total = sums(task, part);  // heads first, then tokens: two short sums round less than a long one
        for (int64_t i = 0; i < 2 * W; ++i) total[i] += rows[i];
      }
    }
  }

  template <class T, bool layer, Rope rope>
  void token(int part, int64_t b, int64_t s, const float* w, const float* spread, float* g, float* rows) const {
    const Tensor &in = x.item[part], &incoming = dout.item[part], &outgoing = dx.item[part];
    const int64_t D = angles.D, H = in.size[2], group = full ? H : 1;
    for (int64_t h = 0; h < H; h += group) {
      float m, r, sum1 = 0, sum2 = 0;
      statistics<T, layer>(head<T>(in, b, s, h), in.stride[2], group, D, eps, m, r);
      for (int64_t j = 0; j < group; ++j) {
        const T *dys = head<T>(incoming, b, s, h + j), *xs = head<T>(in, b, s, h + j);
        const float *c = angles.of_head(spread, h + j), *wj = w + j * D;
        float* gj = g + j * D;
        rotate<rope>(D, angles.pairs(), c, c + D, [&](int64_t i, int n) { return get(dys + i, n); },
                     [&](int64_t i, vf v, int n) { put(gj + i, v, n); });
        if (layer) sum1 += row_sum(D, [&](int64_t i, int n) { return get(gj + i, n) * get(wj + i, n); });
        sum2 += row_sum(D, [&](int64_t i, int n) {
          return get(gj + i, n) * get(wj + i, n) * (get(xs + i, n) - m);
        });
      }
      const float c1 = sum1 / float(group * D), c2 = sum2 * r / float(group * D);
      for (int64_t j = 0; j < group; ++j) {
        const T* xs = head<T>(in, b, s, h + j);
        T* dxs = given(outgoing) ? head<T>(outgoing, b, s, h + j) : nullptr;
        const float *gj = g + j * D, *wj = w + j * D;
        float *of_weight = rows + j * D, *of_bias = of_weight + W;
        each_vector(D, [&](int64_t i, int n) {
          const vf grad = get(gj + i, n), xhat = (get(xs + i, n) - m) * r;
          if (dxs) put(dxs + i, r * (grad * get(wj + i, n) - c1 - xhat * c2), n);
          if (!partial) return;
          put(of_weight + i, get(of_weight + i, n) + grad * xhat, n);
          if (layer) put(of_bias + i, get(of_bias + i, n) + grad, n);
        });
      }
    }
  }

  void reduce(int64_t tasks) const {
    parallel_for(4, tasks * W, [&](int64_t i) {
      const int part = int(i / 2), bias = int(i % 2);
      const Tensor& to = bias ? dbias.item[part] : dweight.item[part];
      if (!given(to)) return;
      Scratch total(2 * W);
      float* some = total.data + W;
      std::memset(total.data, 0, W * 4);
      for (int64_t first = 0; first < tasks; first += kTogether) {
        std::memset(some, 0, W * 4);
        for (int64_t task = first; task < tasks && task < first + kTogether; ++task) {
          const float* from = sums(task, part) + bias * W;
          for (int64_t j = 0; j < W; ++j) some[j] += from[j];
        }
        for (int64_t j = 0; j < W; ++j) total.data[j] += some[j];
      }
      store_row(to.data, total.data, to.dtype, to.size[0]);
    });
  }
};

// kernel.task<T, layer, rope>(b, ...) with the types that fit.
template <class F> void with_kind(DType dtype, bool layer, Rope rope, F body) {
  with_type(dtype, [&](auto type) {
    const auto with_rope = [&](auto is_layer) {
      if (rope == kNone) body(type, is_layer, std::integral_constant<Rope, kNone>{});
      else if (rope == kInterleaved) body(type, is_layer, std::integral_constant<Rope, kInterleaved>{});
      else body(type, is_layer, std::integral_constant<Rope, kHalf>{});
    };
    if (layer) with_rope(std::true_type{});
    else with_rope(std::false_type{});
  });
}

}  // namespace

void qk_norm_rope_forward(const TensorList& x, const TensorList& out, const TensorList& weight, const TensorList& bias,
                          const Tensor& cos, const Tensor& sin, int norm, bool full, bool interleaved, bool inverse,
                          float eps) {
  const Tensor& some = given(x.item[0]) ? x.item[0] : x.item[1];
  if (!given(some)) return;
  const Angles angles{cos, sin, interleaved, inverse ? -1.f : 1.f, some.size[3]};
  const Forward k{x, out, weight, bias, angles, norm != 0, full, eps, widest(x, full)};
  const int64_t B = some.size[0], tasks = tasks_per_sample(x);
  with_kind(some.dtype, norm == 2, k.angles.rope(), [&](auto type, auto layer, auto rope) {
    parallel_for(B * tasks, kTokens * elements(x), [&](int64_t i) {
      k.template task<decltype(type), decltype(layer)::value, decltype(rope)::value>(i / tasks, i % tasks);
    });
  });
}

void qk_norm_rope_backward(const TensorList& dout, const TensorList& x, const TensorList& weight, const Tensor& cos,
                           const Tensor& sin, bool layer_norm, bool full, bool interleaved, float eps,
                           const TensorList& dx, const TensorList& dweight, const TensorList& dbias) {
  const Tensor& q = x.item[0];
  const int64_t B = q.size[0], D = q.size[3], tasks = tasks_per_sample(x), W = widest(x, full);
  bool sums = false;
  for (int i = 0; i < 2; ++i) sums = sums || given(dweight.item[i]) || given(dbias.item[i]);
  Scratch partial(sums ? B * tasks * 4 * W : 1);
  const Backward k{dout, x, weight, {cos, sin, interleaved, -1.f, D}, full, eps, dx, dweight, dbias,
                   sums ? partial.data : nullptr, W};
  with_kind(q.dtype, layer_norm, k.angles.rope(), [&](auto type, auto layer, auto rope) {
    parallel_for(B * tasks, kTokens * elements(x), [&](int64_t i) {
      k.template task<decltype(type), decltype(layer)::value, decltype(rope)::value>(i / tasks, i);
    });
  });
  if (sums) k.reduce(B * tasks);
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
