// patchify and unpatchify on the CPU, contract in kernels/difuse_kernels/patchify/patchify.py.
//
// One loop nest serves both directions: it pairs element (c, f, h, w) of the image with element k of token s. A task is
// one row of grid cells: C*t*p rows of the image on one side, a block of neighbouring tokens on the other, small enough
// for L1, so that either side may be walked in the other's order.
#include "../common/parallel.h"
#include "../common/rows.h"

namespace difuse {
namespace DIFUSE_ISA {
namespace {

template <class T, bool to_image> void move(T* image, T* token, int64_t n) {
  std::memcpy(to_image ? image : token, to_image ? token : image, n * sizeof(T));
}

struct Layout {
  int64_t C, t, p, q;          // sizes
  int64_t c_, t_, p_, q_ = 0;  // strides inside a token
  Layout(int64_t C, int64_t t, int64_t p, int64_t q, const char* order) : C(C), t(t), p(p), q(q), t_(0) {
    int64_t stride = 1;
    for (int i = int(std::strlen(order)) - 1; i >= 0; --i) {
      if (order[i] == 'c') c_ = stride, stride *= C;
      if (order[i] == 't') t_ = stride, stride *= t;
      if (order[i] == 'p') p_ = stride, stride *= p;
      if (order[i] == 'q') q_ = stride, stride *= q;
    }
  }
};

// One image row against `cells` tokens that lie `step` apart. Q: the patch width where it is known, else 0.
template <class T, bool to_image, int Q>
void row(T* image, T* token, int64_t cells, int64_t step, int64_t q, int64_t q_) {
  if (Q) q = Q;
  if (q_ == 1) {
    for (int64_t cell = 0; cell < cells; ++cell) move<T, to_image>(image + cell * q, token + cell * step, q);
  } else {
    for (int64_t cell = 0; cell < cells; ++cell)
      for (int64_t i = 0; i < q; ++i) move<T, to_image>(image + cell * q + i, token + cell * step + i * q_, 1);
  }
}

template <class T, bool to_image, int Q> void run(const Tensor& image, const Tensor& tokens, const Layout& k) {
  const bool video = image.ndim == 5;
  const int64_t cells_w = image.size[image.ndim - 1] / k.q, cells_h = image.size[image.ndim - 2] / k.p;
  const int64_t cells_f = video ? image.size[2] / k.t : 1, rows = cells_f * cells_h;
  const int64_t stride_f = video ? image.stride[2] : 0, stride_h = image.stride[image.ndim - 2];
  // 32768 elements took 21-28 us on one thread and 19-21 on two: moving an element is a quarter of the usual work
  parallel_for(image.size[0] * rows, cells_w * tokens.size[2] / 4 + 1, [&](int64_t task) {
    const int64_t b = task / rows, f = task % rows / cells_h, h = task % cells_h;
    T* from = at<T>(image, b) + f * k.t * stride_f + h * k.p * stride_h;
    T* to = at<T>(tokens, b, task % rows * cells_w);
    for (int64_t c = 0; c < k.C; ++c)
      for (int64_t i = 0; i < k.t; ++i)
        for (int64_t j = 0; j < k.p; ++j)
          row<T, to_image, Q>(from + c * image.stride[1] + i * stride_f + j * stride_h,
                              to + c * k.c_ + i * k.t_ + j * k.p_, cells_w, tokens.stride[1], k.q, k.q_);
  });
}

template <class T, bool to_image> void run_width(const Tensor& image, const Tensor& tokens, const Layout& k) {
  if (k.q == 1) run<T, to_image, 1>(image, tokens, k);
  else if (k.q == 2) run<T, to_image, 2>(image, tokens, k);
  else if (k.q == 4) run<T, to_image, 4>(image, tokens, k);
  else run<T, to_image, 0>(image, tokens, k);
}

}  // namespace

void patchify(const Tensor& image, const Tensor& tokens, int64_t t, int64_t p, int64_t q, const char* order,
              bool to_image) {
  const Layout layout(image.size[1], t, p, q, order);
  if (element_size(image.dtype) == 4) {
    if (to_image) run_width<uint32_t, true>(image, tokens, layout);
    else run_width<uint32_t, false>(image, tokens, layout);
  } else {
    if (to_image) run_width<uint16_t, true>(image, tokens, layout);
    else run_width<uint16_t, false>(image, tokens, layout);
  }
}

}  // namespace DIFUSE_ISA
}  // namespace difuse
