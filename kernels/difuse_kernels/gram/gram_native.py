"""gram on the C++ kernels of the CPU. Kernels: csrc/gram/gram_cpu.cpp; backward: csrc/sampler_step/."""
import torch

from difuse_kernels.gram.gram import columns


class Launchers:
    """The functions of the CPU backend; `machine` is native.py."""

    def __init__(self, machine):
        self.ext, self.machine = machine.ext, machine

    def unsupported(self, _op, inputs):
        """Why these inputs cannot run here, or None."""
        if inputs[0].dim() > 8:
            return "the inputs have more than 8 dimensions"
        if self.machine.unsupported(inputs) is None:
            return None
        return self.machine.unsupported([x if x.stride(-1) == 1 else x[..., :1] for x in inputs])  # those are copied

    def gram_forward(self, inputs):
        """G [B,n+1,n+1], float64. Samples that are not dense are copied first."""
        B, n = len(inputs[0]), len(inputs)
        G = self.machine.empty((B, n + 1, n + 1), torch.float64, inputs[0])
        dense = [x if x.is_contiguous() or x[:1].is_contiguous() else x.contiguous() for x in inputs]
        self.ext.gram(dense, G.view(torch.int32))
        return G

    def gram_backward(self, grad, inputs, needs):
        """Gradients of the inputs, contiguous; None where not needed."""
        ones = torch.ones((), dtype=torch.float32).expand(inputs[0].shape)
        found = [self.machine.empty(x.shape, x.dtype, x) if need else None
                 for x, need in zip(inputs, needs, strict=True)]
        self.ext.sampler_step([*inputs, ones], columns(grad), None, found)
        return found
