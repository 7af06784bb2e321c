// The native table of contents: every kernel's signature. Plain pointers, sizes and strides; nothing of torch here.
// Each *_cpu.cpp is compiled once per instruction set into its own namespace; bindings.cpp picks one table at import.
// Each *_cuda.cu is compiled once, for all GPU architectures, into namespace cuda; bindings_cuda.cpp calls it.
#pragma once
#include <cstdint>
#include <string>

namespace difuse {

enum class DType : int { f32, bf16, f16, i32, u8 };

constexpr int kMaxDims = 8;
constexpr int kNoDevice = -2, kCpu = -1;  // from 0 on: the number of a GPU

// A strided view of somebody else's memory. Strides count elements. data == nullptr means "not given" (or no element).
struct Tensor {
  char* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  int device = kNoDevice;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};
  explicit operator bool() const { return data != nullptr; }
};

constexpr int kMaxList = 8;

// Up to kMaxList tensors, any of which may be absent.
struct TensorList {
  Tensor item[kMaxList];
  int n = 0;
};

// What a launch on a GPU needs beside its arguments: where to run, and float32 scratch memory that lives until the
// kernels launched in this call have run. Scratch is uninitialised and 16-byte aligned.
struct Queue {
  int device;
  void* stream;
  virtual float* scratch(int64_t floats) = 0;
};

// X(name, arguments): outputs are preallocated by the caller and overwritten, never accumulated into. They share no memory
// with inputs.
// On the CPU only.
#define DIFUSE_CPU_ONLY(X)                                                                                             \
  /* kv_lengths, key_bias and stats may be absent. stats [B,H,Sq,2] f32: each query's largest score and 1 / sum. */    \
  X(attention_forward, (const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& kv_lengths,                   \
                        const Tensor& key_bias, float scale, const Tensor& out, const Tensor& stats))                  \
  /* Gradients that are absent are not computed; dbias is key_bias's. */                                               \
  X(attention_backward, (const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,                        \
                         const Tensor& kv_lengths, const Tensor& key_bias, float scale, const Tensor& stats,           \
                         const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dbias))                   \
  /* x and y [B,C,*spatial], in memory so or, with `last`, [B,*spatial,C]. add [B,C] (any strides), weight and bias    \
     [C], mean and rstd [B,groups] f32 may be absent. */                                                               \
  X(group_norm_act_forward, (const Tensor& x, const Tensor& add, const Tensor& weight, const Tensor& bias,             \
                             int64_t groups, bool silu, float eps, bool last, const Tensor& y, const Tensor& mean,     \
                             const Tensor& rstd))                                                                      \
  /* dy, x and dx lie in memory alike. Gradients that are absent are not computed. */                                  \
  X(group_norm_act_backward, (const Tensor& dy, const Tensor& x, const Tensor& add, const Tensor& weight,              \
                              const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t groups, bool silu,   \
                              bool last, const Tensor& dx, const Tensor& dadd, const Tensor& dweight,                  \
                              const Tensor& dbias))                                                                    \
  /* As on all machines, with tables [D], any of them absent, added in float32 to every row of their modulation. */    \
  X(adaln_tables_forward, (const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& scale,                  \
                           const Tensor& shift, const Tensor& weight, const Tensor& bias, const Tensor& gate_table,    \
                           const Tensor& scale_table, const Tensor& shift_table, bool rms, float eps,                  \
                           const Tensor& x_new, const Tensor& h, const Tensor& mean, const Tensor& rstd))              \
  X(adaln_tables_backward, (const Tensor& dx_new, const Tensor& dh, const Tensor& x_new, const Tensor& y,              \
                            const Tensor& gate, const Tensor& scale, const Tensor& shift, const Tensor& weight,        \
                            const Tensor& bias, const Tensor& gate_table, const Tensor& scale_table,                   \
                            const Tensor& shift_table, const Tensor& mean, const Tensor& rstd, bool rms,               \
                            const Tensor& dx, const Tensor& dy, const Tensor& dgate, const Tensor& dscale,             \
                            const Tensor& dshift, const Tensor& dweight, const Tensor& dbias,                          \
                            const Tensor& dgate_table, const Tensor& dscale_table, const Tensor& dshift_table))        \
  X(gate_residual_table_forward, (const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& gate_table,      \
                                  const Tensor& out))                                                                  \
  X(gate_residual_table_backward, (const Tensor& dout, const Tensor& y, const Tensor& gate, const Tensor& gate_table,  \
                                   const Tensor& dy, const Tensor& dgate, const Tensor& dgate_table))                  \
  /* h and h2: one norm of x, modulated twice. All four modulations have a row per sample or all a row per token. */   \
  X(norm_modulate_dual_forward, (const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& scale2,      \
                                 const Tensor& shift2, bool rms, float eps, const Tensor& h, const Tensor& h2,         \
                                 const Tensor& mean, const Tensor& rstd))                                              \
  X(norm_modulate_dual_backward, (const Tensor& dh, const Tensor& dh2, const Tensor& x, const Tensor& scale,           \
                                  const Tensor& shift, const Tensor& scale2, const Tensor& shift2, const Tensor& mean, \
                                  const Tensor& rstd, bool rms, const Tensor& dx, const Tensor& dscale,                \
                                  const Tensor& dshift, const Tensor& dscale2, const Tensor& dshift2))                 \
  /* inputs [B,...], every sample dense; G i32 [B,n+1,2(n+1)], the words of float64 [B,n+1,n+1]. */                    \
  X(gram, (const TensorList& inputs, const Tensor& G))                                                                 \
  /* All contiguous, of one shape. */                                                                                  \
  X(gelu_tanh_forward, (const Tensor& x, const Tensor& out))                                                           \
  X(gelu_tanh_backward, (const Tensor& dout, const Tensor& x, const Tensor& dx))                                       \
  /* out = residual + gate * act(h W^T + bias), h = LayerNorm(x) (1 + scale) + shift. x [M,K] of any float dtype, or u8\
     codes with x_scale f32 [M]; scale, shift [B,K] f32, both or none; smooth f32 [K] times h becomes codes. weight:   \
     packed, see linear_cpu.cpp; f32, bf16, or signed 8-bit numbers in u8, with weight_scale f32 [N] and weight_sums   \
     i32 [N], 128 times the sum of an output's numbers. bias f32 [N]; gate [B,N], residual [M,N] f32, both or none.    \
     activation: "none", "gelu", "gelu_tanh". out [M,N] of any float dtype, or u8 with out_scale f32 [M], the codes of \
     next_smooth f32 [N] times the result. Only residual may be out itself. */                                         \
  X(linear, (const Tensor& x, const Tensor& x_scale, const Tensor& scale, const Tensor& shift, float eps,              \
             const Tensor& smooth, const Tensor& weight, const Tensor& weight_scale, const Tensor& weight_sums,        \
             const Tensor& bias, const char* activation, const Tensor& gate, const Tensor& residual,                   \
             const Tensor& next_smooth, const Tensor& out, const Tensor& out_scale))                                   \
  /* A block of DiT: x, out [M,D] f32, which may be one; modulation [B,6D] f32; qkv, proj, fc1, fc2: packed weight, its\
     scale, sums, smooth, and bias, as `linear` takes them; where k and v are not empty qkv is q's alone. projected    \
     [M,3D], attended [M,D], hidden [M,F] (u8 with hidden_scale f32 [M], or of any float dtype) are scratch. */        \
  X(dit_block, (const Tensor& x, const Tensor& modulation, int64_t heads, float eps1, float eps2,                      \
                const TensorList& qkv, const TensorList& k, const TensorList& v, const TensorList& proj,               \
                const TensorList& fc1, const char* activation, const TensorList& fc2, const Tensor& projected,         \
                const Tensor& attended, const Tensor& hidden, const Tensor& hidden_scale, const Tensor& out))          \
  /* layout i32 [3]: outputs in a panel of a packed weight, outputs in a vector, largest exact 8-bit number of one. */ \
  X(linear_layout, (const Tensor& layout))

// On the CPU and on GPUs.
#define DIFUSE_OPS(X)                                                                                                  \
  /* x_new (absent when y is), h; mean and rstd [B,S] f32 may be absent. scale, shift, gate: [B,D] is one row per       \
     sample, [B,S,D] one per token; weight, bias [D]. */                                                               \
  X(adaln_forward, (const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& scale, const Tensor& shift,    \
                    const Tensor& weight, const Tensor& bias, bool rms, float eps, const Tensor& x_new,                \
                    const Tensor& h, const Tensor& mean, const Tensor& rstd))                                          \
  /* Gradients that are absent are not computed. scale and shift are both per sample or both per token; dscale and     \
     dshift have their shape and any dtype, dgate has gate's. */                                                       \
  X(adaln_backward, (const Tensor& dx_new, const Tensor& dh, const Tensor& x_new, const Tensor& y, const Tensor& gate, \
                     const Tensor& scale, const Tensor& shift, const Tensor& weight, const Tensor& bias,               \
                     const Tensor& mean, const Tensor& rstd, bool rms, const Tensor& dx, const Tensor& dy,             \
                     const Tensor& dgate, const Tensor& dscale, const Tensor& dshift, const Tensor& dweight,           \
                     const Tensor& dbias))                                                                             \
  /* image [B,C,(F,)H,W] <-> tokens [B,S,K], whose elements lie in `order`: letters of "ctpq", slowest first; without  \
     "t" t is 1. The last dimension of both is contiguous; one is read, the other written. */                          \
  X(patchify, (const Tensor& image, const Tensor& tokens, int64_t t, int64_t p, int64_t q, const char* order,          \
               bool to_image))                                                                                         \
  /* outputs[i] = sum_j coefficients[i,j] * inputs[j], coefficients f32 [I,J] or [B,I,J]; any strides, but outputs are \
     contiguous. Absent inputs count as zeros, absent outputs are not computed. noise i32 [B,4], the words of (seed,   \
     step), or absent: one more input, normal values. */                                                               \
  X(sampler_step, (const TensorList& inputs, const Tensor& coefficients, const Tensor& noise,                          \
                   const TensorList& outputs))                                                                         \
  /* x and out: q, k and v [B,S,H,D], any of them absent; v is copied. weight and bias: q's and k's, [D], or [H*D] if  \
     the norm (0 none, 1 RMSNorm, 2 LayerNorm) is full. cos and sin [S,P], [B,S,P] or [B,S,H,P], any strides; inverse  \
     turns back. */                                                                                                    \
  X(qk_norm_rope_forward, (const TensorList& x, const TensorList& out, const TensorList& weight,                       \
                           const TensorList& bias, const Tensor& cos, const Tensor& sin, int norm, bool full,          \
                           bool interleaved, bool inverse, float eps))                                                 \
  /* Lists of q's and k's. Where dout is absent nothing is computed; neither are gradients that are absent. */         \
  X(qk_norm_rope_backward, (const TensorList& dout, const TensorList& x, const TensorList& weight, const Tensor& cos,  \
                            const Tensor& sin, bool layer_norm, bool full, bool interleaved, float eps,                \
                            const TensorList& dx, const TensorList& dweight, const TensorList& dbias))                 \
  /* h [...,2F] strided, out [...,F]; activation is "silu", "gelu" or "gelu_tanh", of the first half or the second. */  \
  X(gated_activation_forward, (const Tensor& h, const char* activation, bool first, const Tensor& out))                \
  X(gated_activation_backward, (const Tensor& dout, const Tensor& h, const char* activation, bool first,               \
                                const Tensor& dh))                                                                     \
  X(gate_residual_forward, (const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& out))                  \
  X(gate_residual_backward, (const Tensor& dout, const Tensor& y, const Tensor& gate, const Tensor& dy,                \
                             const Tensor& dgate))

#define DIFUSE_CPU_OPS(X) DIFUSE_CPU_ONLY(X) DIFUSE_OPS(X)

struct CpuOps {
#define DIFUSE_POINTER(name, arguments) void(*name) arguments;
  DIFUSE_CPU_OPS(DIFUSE_POINTER)
#undef DIFUSE_POINTER
};

#ifdef DIFUSE_ISA
namespace DIFUSE_ISA {
#define DIFUSE_DECLARE(name, arguments) void name arguments;
DIFUSE_CPU_OPS(DIFUSE_DECLARE)
#undef DIFUSE_DECLARE
}  // namespace DIFUSE_ISA
#endif

namespace cuda {
#define DIFUSE_FLAT(...) __VA_ARGS__
#define DIFUSE_DECLARE(name, arguments) void name(Queue& queue, DIFUSE_FLAT arguments);
DIFUSE_OPS(DIFUSE_DECLARE)
#undef DIFUSE_DECLARE
std::string missing();        // why nothing can be launched here, or ""
const char* architectures();  // in this build, e.g. "sm_80 sm_90a sm_100 compute_100"
}  // namespace cuda

}  // namespace difuse
