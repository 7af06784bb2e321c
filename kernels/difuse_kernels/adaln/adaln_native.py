"""adaln on the C++ kernels, for the CPU and for CUDA: allocate the outputs, hand over, return.

Kernels: csrc/adaln/adaln_cpu.cpp, adaln_cuda.cu and their backward passes beside them.
"""
import torch

from difuse_kernels import native_cuda
from difuse_kernels.checks import dense_last

_FIRST_TABLE = {"norm_modulate": 5, "gate_residual": 3, "gate_residual_norm_modulate": 7}  # among the inputs of an op


class Launchers:
    """The functions of one backend; `machine` is native.py or native_cuda.py."""

    def __init__(self, machine):
        self.ext, self.machine, self.empty_like = machine.ext, machine, machine.empty_like
        self.without_tables = machine is native_cuda

    def unsupported(self, op, inputs):
        """Why these inputs cannot run here, or None."""
        if self.without_tables:
            for table in inputs[_FIRST_TABLE[op]:]:
                if table is not None:
                    return "the CUDA C++ kernels add no table to a modulation; the Triton kernels do"
        return self.machine.unsupported(inputs)

    def _stats(self, x, save):
        if not save:
            return None, None
        return tuple(self.machine.empty(x.shape[:2], torch.float32, x) for _ in range(2))

    def norm_modulate_forward(self, x, scale, shift, weight, bias, scale_table, shift_table, norm, eps, save):
        """(h, mean, rstd); the last two are None unless `save`."""
        h = self.empty_like(x)
        mean, rstd = self._stats(x, save)
        if scale_table is None and shift_table is None:
            self.ext.adaln_forward(x, None, None, scale, shift, weight, bias, norm == "rms", eps, None, h, mean, rstd)
        else:
            self.ext.adaln_tables_forward(x, None, None, scale, shift, weight, bias, None, scale_table, shift_table,
                                          norm == "rms", eps, None, h, mean, rstd)
        return h, mean, rstd

    def gate_residual_norm_modulate_forward(self, x, y, gate, scale, shift, weight, bias, gate_table, scale_table,
                                            shift_table, norm, eps, save):
        """(x', h, mean, rstd); the last two are None unless `save`."""
        x_new, h = self.empty_like(x), self.empty_like(x)
        mean, rstd = self._stats(x, save)
        if gate_table is None and scale_table is None and shift_table is None:
            self.ext.adaln_forward(x, y, gate, scale, shift, weight, bias, norm == "rms", eps, x_new, h, mean, rstd)
        else:
            self.ext.adaln_tables_forward(x, y, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table,
                                          norm == "rms", eps, x_new, h, mean, rstd)
        return x_new, h, mean, rstd

    def norm_modulate_dual_forward(self, x, scale, shift, scale2, shift2, norm, eps, save):
        """(h, h2, mean, rstd); the last two are None unless `save`."""
        h, h2 = self.empty_like(x), self.empty_like(x)
        mean, rstd = self._stats(x, save)
        self.ext.norm_modulate_dual_forward(x, scale, shift, scale2, shift2, norm == "rms", eps, h, h2, mean, rstd)
        return h, h2, mean, rstd

    def _grad(self, like, wanted):
        return self.empty_like(like) if wanted and like is not None else None

    def gate_residual_norm_modulate_backward(self, grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias,
                                             gate_table, scale_table, shift_table, mean, rstd, norm, needs):
        """Gradients of x, y, gate, scale, shift, weight, bias and the tables of gate, scale, shift; None where not
        needed. grad_x or grad_h may be None."""
        need_x, need_y, need_gate, need_scale, need_shift, *need_parameters = needs
        grad_x = None if grad_x is None else dense_last(grad_x)
        grad_h = None if grad_h is None else dense_last(grad_h)
        (scale, shift), shapes = _alike(x_new, scale, shift)
        dscale, dshift = self._grad(scale, need_scale), self._grad(shift, need_shift)
        parameters = weight, bias, gate_table, scale_table, shift_table
        dweight, dbias, *dtables = (self._grad(t, need) for t, need in zip(parameters, need_parameters, strict=True))
        if grad_h is None:
            for grad in (dscale, dshift, dweight, dbias, *dtables[1:]):
                if grad is not None:
                    grad.zero_()
            dx, dy, dgate, dtables[0] = self.gate_residual_backward(
                grad_x, y, gate, gate_table, (need_x, need_y, need_gate, need_parameters[2]))
        else:
            dx, dy, dgate = self.empty_like(x_new), self._grad(y, True), self._grad(gate, need_gate)
            if gate_table is None and scale_table is None and shift_table is None:
                self.ext.adaln_backward(grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias, mean, rstd,
                                        norm == "rms", dx, dy, dgate, dscale, dshift, dweight, dbias)
            else:
                self.ext.adaln_tables_backward(
                    grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table,
                    mean, rstd, norm == "rms", dx, dy, dgate, dscale, dshift, dweight, dbias, *dtables)
        dscale, dshift = _shaped((dscale, dshift), shapes)
        return dx if need_x else None, dy, dgate, dscale, dshift, dweight, dbias, *dtables

    def norm_modulate_backward(self, grad, x, scale, shift, weight, bias, scale_table, shift_table, mean, rstd, norm,
                               needs):
        """Gradients of x, scale, shift, weight, bias and the tables of scale, shift; None where not needed."""
        need_x, *others, need_scale_table, need_shift_table = needs
        dx, _, _, *grads, _, dscale_table, dshift_table = self.gate_residual_norm_modulate_backward(
            None, grad, x, None, None, scale, shift, weight, bias, None, scale_table, shift_table, mean, rstd, norm,
            (need_x, False, False, *others, False, need_scale_table, need_shift_table))
        return dx, *grads, dscale_table, dshift_table

    def norm_modulate_dual_backward(self, grad, grad2, x, scale, shift, scale2, shift2, mean, rstd, norm, needs):
        """Gradients of x, scale, shift, scale2, shift2; None where not needed. grad or grad2 may be None."""
        rows = scale, shift, scale2, shift2
        if grad is None or grad2 is None:  # one of the results is not used: one modulation
            used = 2 if grad is None else 0
            dx, dscale, dshift, *_ = self.norm_modulate_backward(
                grad2 if grad is None else grad, x, *rows[used : used + 2], None, None, None, None, mean, rstd, norm,
                (needs[0], *needs[1 + used : 3 + used], False, False, False, False))
            zeros = [grad if grad is None else grad.zero_() for grad in
                     (self._grad(rows[i], needs[1 + i]) for i in ((0, 1) if used else (2, 3)))]
            return (dx, *zeros, dscale, dshift) if used else (dx, dscale, dshift, *zeros)
        rows, shapes = _alike(x, *rows)
        grads = [self._grad(row, need) for row, need in zip(rows, needs[1:], strict=True)]
        dx = self.empty_like(x)
        self.ext.norm_modulate_dual_backward(dense_last(grad), dense_last(grad2), x, *rows, mean, rstd, norm == "rms",
                                             dx, *grads)
        return dx if needs[0] else None, *_shaped(grads, shapes)

    def gate_residual_forward(self, x, y, gate, gate_table):
        """x + gate * y."""
        out = self.empty_like(x)
        if gate_table is None:
            self.ext.gate_residual_forward(x, y, gate, out)
        else:
            self.ext.gate_residual_table_forward(x, y, gate, gate_table, out)
        return out

    def gate_residual_backward(self, grad, y, gate, gate_table, needs):
        """Gradients of x, y, gate and its table; None where not needed."""
        need_x, need_y, need_gate, need_table = needs
        grad = dense_last(grad)
        dy = dgate = dtable = None
        if gate is None:
            dy = grad.to(y.dtype) if need_y else None
        elif gate_table is not None and (need_y or need_gate or need_table):
            dy, dgate, dtable = self._grad(y, True), self._grad(gate, need_gate), self._grad(gate_table, need_table)
            self.ext.gate_residual_table_backward(grad, y, gate, gate_table, dy, dgate, dtable)
        elif need_y or need_gate:
            dy, dgate = self._grad(y, True), self._grad(gate, need_gate)
            self.ext.gate_residual_backward(grad, y, gate, dy, dgate)
        return grad if need_x else None, dy, dgate, dtable


def _alike(x, *rows):
    """(modulations that all have a row per sample or all a row per token, as the kernels take them, what `_shaped`
    needs to sum their gradients afterwards)."""
    dims = [row.dim() for row in rows if row is not None]
    if len(set(dims)) < 2:
        return rows, None
    return [row if row.dim() == 3 else row.unsqueeze(1).expand(x.shape) for row in rows], dims


def _shaped(grads, dims):
    if dims is None:
        return grads
    return [grad if grad is None or dim == 3 else grad.sum(1, dtype=torch.float32).to(grad.dtype)
            for grad, dim in zip(grads, dims, strict=True)]
