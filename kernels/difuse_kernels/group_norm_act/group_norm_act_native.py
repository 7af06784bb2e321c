"""group_norm_act on the C++ kernels of the CPU: allocate the outputs, hand over, return.

Kernels: csrc/group_norm_act/.
"""
import torch

from difuse_kernels.group_norm_act.group_norm_act_layout import (
    NOT_DENSE,
    channels_last,
    image_like,
    in_format_of,
    memory,
)


class Launchers:
    """The functions of the CPU backend; `machine` is native.py."""

    def __init__(self, machine):
        self.ext, self.machine = machine.ext, machine

    def unsupported(self, _op, inputs):
        """Why these inputs cannot run here, or None."""
        x, add, weight, bias = inputs
        if channels_last(x) is None:
            return NOT_DENSE
        add = None if add is None else add[:, :1]  # any strides
        return self.machine.unsupported((memory(x), add, weight, bias))

    def _image(self, x):
        return image_like(x, lambda shape: self.machine.empty(shape, x.dtype, x))

    def group_norm_act_forward(self, x, add, weight, bias, groups, activation, eps, save):
        """(y, mean, rstd); the last two, [B,groups], are None unless `save`."""
        y = self._image(x)
        mean, rstd = (self.machine.empty((x.shape[0], groups), torch.float32, x) if save else None for _ in range(2))
        self.ext.group_norm_act_forward(x, add, weight, bias, groups, activation == "silu", eps, channels_last(x), y,
                                        mean, rstd)
        return y, mean, rstd

    def group_norm_act_backward(self, grad, x, add, weight, bias, mean, rstd, groups, activation, needs):
        """Gradients of x, add, weight, bias; None where not needed."""
        dx = self._image(x) if needs[0] else None
        others = [self.machine.empty_like(like) if wanted and like is not None else None
                  for like, wanted in zip((add, weight, bias), needs[1:], strict=True)]
        self.ext.group_norm_act_backward(in_format_of(x, grad), x, add, weight, bias, mean, rstd, groups,
                                         activation == "silu", channels_last(x), dx, *others)
        return dx, *others
