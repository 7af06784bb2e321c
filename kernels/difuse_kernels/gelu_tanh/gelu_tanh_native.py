"""gelu_tanh on the C++ kernels. Kernels: csrc/gelu_tanh/gelu_tanh_cpu.cpp."""


class Launchers:
    """The functions of one backend; `machine` is native.py."""

    def __init__(self, machine):
        self.ext, self.machine = machine.ext, machine

    def unsupported(self, _op, inputs):
        """Why these inputs cannot run here, or None."""
        x, = inputs
        if not x.is_contiguous() or not 0 < x.dim() <= 8:
            return "the kernel takes contiguous tensors of 1 to 8 dimensions"
        return self.machine.unsupported(inputs)

    def gelu_tanh_forward(self, x):
        """GELU, contiguous."""
        out = self.machine.empty_like(x)
        self.ext.gelu_tanh_forward(x, out)
        return out

    def gelu_tanh_backward(self, grad, x):
        """The gradient of x, contiguous."""
        dx = self.machine.empty_like(x)
        self.ext.gelu_tanh_backward(grad.contiguous(), x, dx)
        return dx
