"""gated_activation on the C++ CPU kernels. Kernels: csrc/gated_activation/gated_activation_cpu.cpp."""
from difuse_kernels.checks import dense_last, why_not_cpu
from difuse_kernels.native import empty, empty_like, ext


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None."""
    return why_not_cpu(inputs) or ("the kernels take at most 8 dimensions" if inputs[0].dim() > 8 else None)


def gated_activation_forward(h, activation, act_on):
    """act(a) * b or a * act(b), contiguous."""
    out = empty((*h.shape[:-1], h.shape[-1] // 2), h.dtype)
    ext.gated_activation_forward(h, activation, act_on == "first", out)
    return out


def gated_activation_backward(grad, h, activation, act_on):
    """The gradient of h, contiguous."""
    dh = empty_like(h)
    ext.gated_activation_backward(dense_last(grad), h, activation, act_on == "first", dh)
    return dh
