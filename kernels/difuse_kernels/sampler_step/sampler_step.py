"""sampler_step: the update of a diffusion sampler, a few linear combinations of a few tensors, in one pass.

    out_i = sum_j C[i,j] * inputs_j          i = 1..I, I <= 4          j = 1..J, J <= 8

DDIM, DDPM, Euler and multistep solvers are rows of C; classifier-free guidance is two columns, w*C for the conditional
and (1-w)*C for the unconditional half of the model's output (Ho & Salimans 2022, arXiv:2207.12598), so that the guided
output is never written. C is float32 [I,J], or [B,I,J] with one set per sample, and lives on the device.

With noise, int64 [B,2] on the device, C has one more column, and the last input is standard normal noise that is drawn
in the kernel and never written: its values depend on the sample's (seed, step) and the element's place in the sample
alone, and agree between backends to float32 rounding. sampler_step_reference.py defines the stream. GPU kernels read
seeds, steps and coefficients on the device: one captured CUDA graph serves every step, with new values in place.

Inputs have one shape [B,...]; their strides are free and their dtypes may be mixed (float32, bfloat16, float16; float64
on the reference, which then sums in float64, with coefficients that may be float64 too). Sums are float32, each input
is read once, each output written once. The arithmetic is plain: a coefficient of 0 turns an infinity or NaN into NaN,
it does not switch the input off.
"""
import torch

from difuse_kernels.checks import FLOATS, apply, check_same_device, check_tensor, needs_grad
from difuse_kernels.dispatch import Op

SAMPLER_STEP = Op("sampler_step", "difuse_kernels.sampler_step.sampler_step", "cpu", "cuda", "triton")
_MAX_INPUTS, _MAX_OUTPUTS = 8, 4


def _check(inputs, coefficients, noise, out_dtypes):
    if not isinstance(inputs, (tuple, list)) or not 1 <= len(inputs) <= _MAX_INPUTS:
        got = len(inputs) if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        raise ValueError(f"sampler_step: inputs is {got}; expected a tuple or list of 1 to {_MAX_INPUTS} tensors")
    shape = None
    for x in inputs:
        if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"sampler_step: an input is {got}; expected floating tensors. Convert it with .float()")
        shape = shape or x.shape
        if x.shape != shape or not shape:
            raise ValueError(f"sampler_step: inputs have shapes {tuple(shape)} and {tuple(x.shape)}; expected one "
                             "shape [B,...]. Slice off what the step does not use, e.g. the learned variance")
    check_tensor("sampler_step", "coefficients", coefficients, "[I,J] or [B,I,J]", (2, 3))
    exact = coefficients.dtype == torch.float64 and any(x.dtype == torch.float64 for x in inputs)
    if coefficients.dtype != torch.float32 and not exact:
        raise TypeError(f"sampler_step: coefficients has dtype {coefficients.dtype}; expected torch.float32, or "
                        "float64 beside an input of float64. Compute it in float64 and convert it with .float()")
    if noise is not None:
        _check_noise(noise, inputs[0])
    *B, I, J = coefficients.shape  # noqa: E741
    columns = len(inputs) + (noise is not None)
    if not 1 <= I <= _MAX_OUTPUTS or columns != J or (B and B[0] != shape[0]):
        drawn = "" if noise is None else " and the noise"
        raise ValueError(f"sampler_step: coefficients has shape {tuple(coefficients.shape)}; expected [I,{columns}] or "
                         f"[B,I,{columns}] with I from 1 to {_MAX_OUTPUTS}, for {len(inputs)} inputs of shape "
                         f"{tuple(shape)}{drawn}")
    if out_dtypes is None:
        return (inputs[0].dtype,) * I
    listed = isinstance(out_dtypes, (tuple, list))
    if not listed or len(out_dtypes) != I or any(dtype not in FLOATS for dtype in out_dtypes):
        raise ValueError(f"sampler_step: out_dtypes is {out_dtypes}; expected {I} floating dtypes, one per output")
    return out_dtypes


def _check_noise(noise, x):
    if not isinstance(noise, torch.Tensor) or noise.dtype != torch.int64 or noise.shape != (x.shape[0], 2):
        got = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, torch.Tensor) else type(noise).__name__
        raise ValueError(f"sampler_step: noise is {got}; expected torch.int64 {(x.shape[0], 2)}, the (seed, step) of "
                         "each sample. Drawn noise is an input like the others")
    check_same_device("sampler_step", (x, noise))  # backends look at the floating tensors only


class _SamplerStep(torch.autograd.Function):
    @staticmethod
    def forward(implementation, *arguments):
        *inputs, coefficients, noise, out_dtypes = arguments
        return implementation.forward(inputs, coefficients, noise, out_dtypes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, *inputs, coefficients, _, _ = inputs
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(coefficients)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[1:-3]
        coefficients = ctx.saved_tensors[0][..., : len(needs)]  # noise is a constant
        return None, *ctx.implementation.backward(grads, coefficients, ctx.dtypes, needs), None, None, None


def sampler_step(inputs, coefficients, *, noise=None, out_dtypes=None, backend="auto"):
    """A tuple of I contiguous tensors, out_i = sum_j coefficients[..., i, j] * inputs[j], shaped like the inputs.

    inputs: 1 to 8 tensors [B,...]; coefficients: float32 [I,J] or [B,I,J]; out_dtypes: I dtypes, else inputs[0]'s.
    noise: int64 [B,2], each sample's (seed, step): noise as one more input, whose column of coefficients is last.
    Raises ValueError or TypeError for a wrong count, shape, dtype or device, RuntimeError where `backend` cannot run.
    """
    out_dtypes = _check(inputs, coefficients, noise, out_dtypes)
    implementation = SAMPLER_STEP.select(backend, (*inputs, coefficients, noise))
    if implementation.backward is not None and needs_grad(*inputs):
        return apply(_SamplerStep, implementation, *inputs, coefficients, noise, out_dtypes)
    return implementation.forward(inputs, coefficients, noise, out_dtypes)
