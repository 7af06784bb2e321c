"""adaln on the C++ CPU kernels: allocate the outputs, hand over, return. Kernels: csrc/adaln/adaln_cpu.cpp."""
import torch

from difuse_kernels.checks import dense_last, why_not_cpu
from difuse_kernels.native import empty_like, ext


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None."""
    return why_not_cpu(inputs)


def _stats(x, save):
    shape = x.shape[:2]
    return (torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.float32)) if save else (None, None)


def norm_modulate_forward(x, scale, shift, weight, bias, norm, eps, save):
    """(h, mean, rstd); the last two are None unless `save`."""
    h = empty_like(x)
    mean, rstd = _stats(x, save)
    ext.adaln_forward(x, None, None, scale, shift, weight, bias, norm == "rms", eps, None, h, mean, rstd)
    return h, mean, rstd


def gate_residual_norm_modulate_forward(x, y, gate, scale, shift, weight, bias, norm, eps, save):
    """(x', h, mean, rstd); the last two are None unless `save`."""
    x_new = empty_like(x)
    h = empty_like(x)
    mean, rstd = _stats(x, save)
    ext.adaln_forward(x, y, gate, scale, shift, weight, bias, norm == "rms", eps, x_new, h, mean, rstd)
    return x_new, h, mean, rstd


def _grad(like, wanted):
    return empty_like(like) if wanted and like is not None else None


def gate_residual_norm_modulate_backward(grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias, mean, rstd, norm,
                                         needs):
    """Gradients of x, y, gate, scale, shift, weight, bias; None where not needed. grad_x or grad_h may be None."""
    need_x, need_y, need_gate, need_scale, need_shift, need_weight, need_bias = needs
    grad_x = None if grad_x is None else dense_last(grad_x)
    grad_h = None if grad_h is None else dense_last(grad_h)
    mixed = None not in (scale, shift) and scale.dim() != shift.dim()
    if mixed:  # the kernel takes both per sample or both per token; a row per sample is summed afterwards
        shapes = scale.dim(), shift.dim()
        scale, shift = (m if m.dim() == 3 else m.unsqueeze(1).expand(x_new.shape) for m in (scale, shift))
    dscale, dshift = _grad(scale, need_scale), _grad(shift, need_shift)
    dweight, dbias = _grad(weight, need_weight), _grad(bias, need_bias)
    if grad_h is None:
        for grad in (dscale, dshift, dweight, dbias):
            if grad is not None:
                grad.zero_()
        dx, dy, dgate = gate_residual_backward(grad_x, y, gate, x_new.dtype, (need_x, need_y, need_gate))
    else:
        dx, dy, dgate = empty_like(x_new), _grad(y, True), _grad(gate, need_gate)
        ext.adaln_backward(grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias, mean, rstd, norm == "rms", dx,
                           dy, dgate, dscale, dshift, dweight, dbias)
    if mixed:
        dscale, dshift = (g if g is None or dim == 3 else g.sum(1, dtype=torch.float32).to(g.dtype)
                          for g, dim in zip((dscale, dshift), shapes, strict=True))
    return dx if need_x else None, dy, dgate, dscale, dshift, dweight, dbias


def norm_modulate_backward(grad, x, scale, shift, weight, bias, mean, rstd, norm, needs):
    """Gradients of x, scale, shift, weight, bias; None where not needed."""
    need_x, *others = needs
    dx, _, _, *grads = gate_residual_norm_modulate_backward(
        None, grad, x, None, None, scale, shift, weight, bias, mean, rstd, norm, (need_x, False, False, *others))
    return dx, *grads


def gate_residual_forward(x, y, gate):
    """x + gate * y."""
    out = empty_like(x)
    ext.gate_residual_forward(x, y, gate, out)
    return out


def gate_residual_backward(grad, y, gate, _x_dtype, needs):
    """Gradients of x, y, gate; None where not needed."""
    need_x, need_y, need_gate = needs
    grad = dense_last(grad)
    dy = dgate = None
    if gate is None:
        dy = grad.to(y.dtype) if need_y else None
    elif need_y or need_gate:
        dy, dgate = _grad(y, True), _grad(gate, need_gate)
        ext.gate_residual_backward(grad, y, gate, dy, dgate)
    return grad if need_x else None, dy, dgate
