"""adaln on the C++ kernels, for the CPU and for CUDA: allocate the outputs, hand over, return.

Kernels: csrc/adaln/adaln_cpu.cpp, adaln_cuda.cu.
"""
import torch

from difuse_kernels.checks import dense_last


class Launchers:
    """The functions of one backend; `machine` is native.py or native_cuda.py."""

    def __init__(self, machine):
        self.ext, self.machine, self.empty_like = machine.ext, machine, machine.empty_like

    def unsupported(self, _op, inputs):
        """Why these inputs cannot run here, or None."""
        return self.machine.unsupported(inputs)

    def _stats(self, x, save):
        if not save:
            return None, None
        return tuple(self.machine.empty(x.shape[:2], torch.float32, x) for _ in range(2))

    def norm_modulate_forward(self, x, scale, shift, weight, bias, norm, eps, save):
        """(h, mean, rstd); the last two are None unless `save`."""
        h = self.empty_like(x)
        mean, rstd = self._stats(x, save)
        self.ext.adaln_forward(x, None, None, scale, shift, weight, bias, norm == "rms", eps, None, h, mean, rstd)
        return h, mean, rstd

    def gate_residual_norm_modulate_forward(self, x, y, gate, scale, shift, weight, bias, norm, eps, save):
        """(x', h, mean, rstd); the last two are None unless `save`."""
        x_new, h = self.empty_like(x), self.empty_like(x)
        mean, rstd = self._stats(x, save)
        self.ext.adaln_forward(x, y, gate, scale, shift, weight, bias, norm == "rms", eps, x_new, h, mean, rstd)
        return x_new, h, mean, rstd

    def _grad(self, like, wanted):
        return self.empty_like(like) if wanted and like is not None else None

    def gate_residual_norm_modulate_backward(self, grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias, mean,
                                             rstd, norm, needs):
        """Gradients of x, y, gate, scale, shift, weight, bias; None where not needed. grad_x or grad_h may be None."""
        need_x, need_y, need_gate, need_scale, need_shift, need_weight, need_bias = needs
        grad_x = None if grad_x is None else dense_last(grad_x)
        grad_h = None if grad_h is None else dense_last(grad_h)
        mixed = None not in (scale, shift) and scale.dim() != shift.dim()
        if mixed:  # the kernel takes both per sample or both per token; a row per sample is summed afterwards
            shapes = scale.dim(), shift.dim()
            scale, shift = (m if m.dim() == 3 else m.unsqueeze(1).expand(x_new.shape) for m in (scale, shift))
        dscale, dshift = self._grad(scale, need_scale), self._grad(shift, need_shift)
        dweight, dbias = self._grad(weight, need_weight), self._grad(bias, need_bias)
        if grad_h is None:
            for grad in (dscale, dshift, dweight, dbias):
                if grad is not None:
                    grad.zero_()
            dx, dy, dgate = self.gate_residual_backward(grad_x, y, gate, (need_x, need_y, need_gate))
        else:
            dx, dy, dgate = self.empty_like(x_new), self._grad(y, True), self._grad(gate, need_gate)
            self.ext.adaln_backward(grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias, mean, rstd,
                                    norm == "rms", dx, dy, dgate, dscale, dshift, dweight, dbias)
        if mixed:
            dscale, dshift = (g if g is None or dim == 3 else g.sum(1, dtype=torch.float32).to(g.dtype)
                              for g, dim in zip((dscale, dshift), shapes, strict=True))
        return dx if need_x else None, dy, dgate, dscale, dshift, dweight, dbias

    def norm_modulate_backward(self, grad, x, scale, shift, weight, bias, mean, rstd, norm, needs):
        """Gradients of x, scale, shift, weight, bias; None where not needed."""
        need_x, *others = needs
        dx, _, _, *grads = self.gate_residual_norm_modulate_backward(
            None, grad, x, None, None, scale, shift, weight, bias, mean, rstd, norm, (need_x, False, False, *others))
        return dx, *grads

    def gate_residual_forward(self, x, y, gate):
        """x + gate * y."""
        out = self.empty_like(x)
        self.ext.gate_residual_forward(x, y, gate, out)
        return out

    def gate_residual_backward(self, grad, y, gate, needs):
        """Gradients of x, y, gate; None where not needed."""
        need_x, need_y, need_gate = needs
        grad = dense_last(grad)
        dy = dgate = None
        if gate is None:
            dy = grad.to(y.dtype) if need_y else None
        elif need_y or need_gate:
            dy, dgate = self._grad(y, True), self._grad(gate, need_gate)
            self.ext.gate_residual_backward(grad, y, gate, dy, dgate)
        return grad if need_x else None, dy, dgate
