"""gated_activation on the C++ kernels, for the CPU and for CUDA.

Kernels: csrc/gated_activation/gated_activation_cpu.cpp, gated_activation_cuda.cu.
"""
from difuse_kernels.checks import dense_last


class Launchers:
    """The functions of one backend; `machine` is native.py or native_cuda.py."""

    def __init__(self, machine):
        self.ext, self.machine = machine.ext, machine

    def unsupported(self, _op, inputs):
        """Why these inputs cannot run here, or None."""
        return self.machine.unsupported(inputs) or (
            "the kernels take at most 8 dimensions" if inputs[0].dim() > 8 else None)

    def gated_activation_forward(self, h, activation, act_on):
        """act(a) * b or a * act(b), contiguous."""
        out = self.machine.empty((*h.shape[:-1], h.shape[-1] // 2), h.dtype, h)
        self.ext.gated_activation_forward(h, activation, act_on == "first", out)
        return out

    def gated_activation_backward(self, grad, h, activation, act_on):
        """The gradient of h, contiguous."""
        dh = self.machine.empty_like(h)
        self.ext.gated_activation_backward(dense_last(grad), h, activation, act_on == "first", dh)
        return dh
