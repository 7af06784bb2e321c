"""sampler_step on the C++ CPU kernel. Kernel: csrc/sampler_step/sampler_step_cpu.cpp."""
import torch

from difuse_kernels.checks import KERNEL_DTYPES
from difuse_kernels.native import empty, ext


def unsupported(_op, inputs):
    """Why these inputs (the step's, then the coefficients and the noise) cannot run here, or None."""
    *tensors, _ = inputs
    for x in tensors:
        if x.dtype not in KERNEL_DTYPES:
            return f"an input has dtype {x.dtype}; the kernel takes float32, bfloat16 and float16"
        if not x.is_cpu:
            return f"an input is on {x.device.type}"
    if inputs[0].dim() > 8:
        return "the inputs have more than 8 dimensions"
    if tensors[-1].requires_grad and torch.is_grad_enabled():
        return "the coefficients need a gradient; .detach() them unless it is wanted"
    return None


def sampler_step_forward(inputs, coefficients, noise, out_dtypes):
    """A tuple of outputs, one per row of the coefficients."""
    shape = inputs[0].shape
    outputs = tuple([empty(shape, dtype) for dtype in out_dtypes])
    if noise is not None:
        noise = noise.contiguous().view(torch.int32)  # [B,4]: low and high words (little-endian)
    ext.sampler_step(inputs, coefficients, noise, outputs)
    return outputs


def sampler_step_backward(grads, coefficients, dtypes, needs):
    """Gradients of the inputs: the same kernel with the transposed coefficients. Absent gradients are left out."""
    shapes = [grad.shape for grad in grads if grad is not None]
    if not shapes:
        return (None,) * len(needs)
    outputs = tuple([empty(shapes[0], dtype) if need else None for dtype, need in zip(dtypes, needs, strict=True)])
    ext.sampler_step(grads, coefficients.transpose(-1, -2), None, outputs)
    return outputs
