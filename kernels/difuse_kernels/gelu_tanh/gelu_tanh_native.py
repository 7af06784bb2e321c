"""gelu_tanh on the C++ kernels. Kernels: csrc/gelu_tanh/gelu_tanh_cpu.cpp."""
from difuse_kernels.checks import dense_last


class Launchers:
    """The functions of one backend; `machine` is native.py."""

    def __init__(self, machine):
        self.ext, self.machine = machine.ext, machine

    def unsupported(self, _op, inputs):
        """Why these inputs cannot run here, or None."""
        return self.machine.unsupported(inputs) or (
            "the kernels take at most 8 dimensions" if inputs[0].dim() > 8 else None)

    def gelu_tanh_forward(self, x):
        """GELU, contiguous."""
        out = self.machine.empty_like(x)
        self.ext.gelu_tanh_forward(x, out)
        return out

    def gelu_tanh_backward(self, grad, x):
        """The gradient of x, contiguous."""
        dx = self.machine.empty_like(x)
        self.ext.gelu_tanh_backward(dense_last(grad), x, dx)
        return dx
