"""gram on the C++ kernels of the CPU. Kernels: csrc/gram/gram_cpu.cpp; backward: csrc/sampler_step/."""
import torch

from difuse_kernels.checks import any_strides
from difuse_kernels.gram.gram import backward_step, dense


class Launchers:
    """The functions of the CPU backend; `machine` is native.py."""

    def __init__(self, machine):
        self.ext, self.machine = machine.ext, machine

    def unsupported(self, _op, inputs):
        """Why these inputs cannot run here, or None."""
        if inputs[0].dim() > 8:
            return "the inputs have more than 8 dimensions"
        return self.machine.unsupported(inputs) and self.machine.unsupported(any_strides(inputs))  # those are copied

    def gram_forward(self, inputs):
        """G [B,n+1,n+1], float64. Samples that are not dense are copied first."""
        B, n = len(inputs[0]), len(inputs)
        G = self.machine.empty((B, n + 1, n + 1), torch.float64, inputs[0])
        self.ext.gram(dense(inputs), G.view(torch.int32))
        return G

    def gram_backward(self, grad, inputs, needs):
        """Gradients of the inputs, contiguous; None where not needed."""
        found = [self.machine.empty(x.shape, x.dtype, x) if need else None
                 for x, need in zip(inputs, needs, strict=True)]
        inputs, coefficients = backward_step(grad, inputs)
        self.ext.sampler_step(inputs, coefficients, None, found)
        return found
