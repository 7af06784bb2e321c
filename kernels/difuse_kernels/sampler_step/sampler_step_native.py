"""sampler_step on the C++ kernels, for the CPU and for CUDA.

Kernels: csrc/sampler_step/sampler_step_cpu.cpp, sampler_step_cuda.cu.
"""
import torch

from difuse_kernels.checks import any_strides


class Launchers:
    """The functions of one backend; `machine` is native.py or native_cuda.py."""

    def __init__(self, machine):
        self.ext, self.machine = machine.ext, machine

    def unsupported(self, _op, inputs):
        """Why these inputs (the step's, then the coefficients and the noise) cannot run here, or None."""
        tensors = inputs[:-1]
        if inputs[0].dim() > 8:
            return "the inputs have more than 8 dimensions"
        if tensors[-1].requires_grad and torch.is_grad_enabled():
            return "the coefficients need a gradient; .detach() them unless it is wanted"
        return self.machine.unsupported(tensors) and self.machine.unsupported(any_strides(tensors))

    def sampler_step_forward(self, inputs, coefficients, noise, out_dtypes):
        """A tuple of outputs, one per row of the coefficients."""
        like = inputs[0]
        outputs = tuple([self.machine.empty(like.shape, dtype, like) for dtype in out_dtypes])
        if noise is not None:
            noise = noise.contiguous().view(torch.int32)  # [B,4]: low and high words (little-endian)
        self.ext.sampler_step(inputs, coefficients, noise, outputs)
        return outputs

    def sampler_step_backward(self, grads, coefficients, dtypes, needs):
        """Gradients of the inputs: the same kernel with the transposed coefficients. Absent gradients are left out."""
        like = next((grad for grad in grads if grad is not None), None)
        if like is None:
            return (None,) * len(needs)
        outputs = tuple([self.machine.empty(like.shape, dtype, like) if need else None
                         for dtype, need in zip(dtypes, needs, strict=True)])
        self.ext.sampler_step(grads, coefficients.transpose(-1, -2), None, outputs)
        return outputs
