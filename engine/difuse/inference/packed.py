"""Matrix products of a frozen model: oneDNN's, in three precisions, on weights packed once wherever it takes them."""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from difuse.integrations import products
from difuse.integrations.products import emulates_bfloat16
from difuse_kernels import dequantize, gelu_tanh, quantize, requantize
from difuse_kernels.quantize.quantize import ZERO

# Behind a product in AVX2 instructions oneDNN's GELU takes 13 to 19 ms where ours, a pass of its own, takes 2: two
# Zen 3 cores, [2048,384] to 1536 and [512,1152] to 4608.
_FUSES_GELU = torch.backends.cpu.get_cpu_capability() == "AVX512"


class PackedProduct(nn.Module):
    """x [...,K] -> [...,N]: the nn.Linear it was made from, in float32, and perhaps a GELU.

    gelu: "tanh" or "none" (exact), as of nn.GELU, or None for no activation.
    """

    bias_dtype = torch.float32
    takes = (torch.float32,)

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.gelu = None
        self.bias = None if linear.bias is None else nn.Parameter(
            torch.empty_like(linear.bias, dtype=self.bias_dtype), requires_grad=False)
        self.times_packed = 0  # tells `cache_conditioning` that the weight is another one
        self.pack(linear)

    def pack(self, linear):
        """Read the weight and bias of `linear` again."""
        # no buffers: they must stay as they are when the model is moved or converted
        self.packed = self._packed(linear.weight.detach())
        self.times_packed += 1
        if self.bias is not None:
            self.bias.data.copy_(linear.bias.detach())

    def _packed(self, weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    @property
    def weight(self):
        """[N,K], unpacked anew at every access, for those who read it: slow, and nobody's gradient."""
        return self.packed.to_dense()

    def tensors(self):
        """All that it holds."""
        return [tensor for tensor in (self.packed, self.bias) if tensor is not None]

    def forward(self, x):
        """Raises TypeError for another dtype, RuntimeError where a gradient is asked for."""
        if x.dtype not in self.takes:
            raise TypeError(f"a frozen model's product got {x.dtype}; expected torch.float32. Convert the inputs with "
                            ".float(), and call it outside of torch.autocast")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a frozen model has no gradients; call it under torch.no_grad()")
        return self._product(x)

    def _product(self, x):
        if self.gelu is None or not _FUSES_GELU:
            return self._activated(torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], ""))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "gelu", [], self.gelu)  # [...,N]

    def _activated(self, y):
        if self.gelu is None:
            return y
        return gelu_tanh(y) if self.gelu == "tanh" else F.gelu(y)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, gelu={self.gelu}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise RuntimeError("a frozen model's weights are packed for this machine; save the model it was made from")


class BFloat16Product(PackedProduct):
    """The same with operands and results rounded to bfloat16: half the memory. What it returns is float32 all the same.

    hands_on: its reader rounds what it gets to bfloat16 too, so that it is given bfloat16. A CPU without bfloat16
    products multiplies the same values in float32, on weights that it widens at every call.
    """

    bias_dtype = torch.bfloat16
    takes = torch.float32, torch.bfloat16
    hands_on = False

    def _packed(self, weight):
        weight = weight.to(torch.bfloat16).contiguous()
        return weight if emulates_bfloat16() else super()._packed(weight)

    @property
    def weight(self):
        return self.packed if emulates_bfloat16() else super().weight

    def _product(self, x):
        x = x.to(torch.bfloat16)
        y = self._activated(products.linear(self, x)) if emulates_bfloat16() else super()._product(x)
        return y if self.hands_on else y.float()  # [...,N]


class Codes(NamedTuple):
    """What one 8-bit product hands to the next: see difuse_kernels.quantize."""

    codes: torch.Tensor  # uint8 [...,K]
    scale: torch.Tensor  # float32 [...]


class Int8Product(PackedProduct):
    """The same in integers: 8-bit weights with a scale per output, 8-bit inputs with a scale per row, of this call.

    smooth: float32 [K], 1 / s of SmoothQuant, or None. Inputs are multiplied by it, the weight is divided by it.
    """

    def __init__(self, linear, smooth=None):
        object.__setattr__(self, "smooth", smooth)  # pack() needs it, before nn.Module is ready
        self.read_by(None)
        super().__init__(linear)

    def read_by(self, reader):
        """From now on hand codes to `reader`, the Int8Product that alone reads this one's results."""
        object.__setattr__(self, "reader", reader)  # a neighbour, no submodule

    def _packed(self, weight):
        if self.smooth is not None:
            weight = weight / self.smooth
        self.scale = weight.abs().amax(1).clamp_min(1e-30) / largest_weight()  # [N]
        self.zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        return torch.ops.onednn.qlinear_prepack((weight / self.scale[:, None]).round().to(torch.int8), None)

    @property
    def weight(self):
        """[N,K] with its rounding."""
        ones = torch.eye(self.in_features, dtype=torch.uint8, device=self.scale.device)
        weight = integer_product(ones, self.packed, self.scale, self.zeros, 0).T  # [N,K]
        return weight if self.smooth is None else weight * self.smooth

    def tensors(self):
        return [*super().tensors(), self.scale, self.zeros, *(() if self.smooth is None else (self.smooth,))]

    def forward(self, x):
        return self._product(x) if isinstance(x, Codes) else super().forward(x)

    def _product(self, x):
        x = x if isinstance(x, Codes) else Codes(*quantize(x.contiguous(), self.smooth))
        sums = integer_product(x.codes, self.packed, self.scale, self.zeros, ZERO)  # [...,N]
        activation = {None: "none", "none": "gelu", "tanh": "gelu_tanh"}[self.gelu]
        if self.reader is None:
            return dequantize(sums, x.scale, self.bias, activation=activation)  # [...,N]
        return Codes(*requantize(sums, x.scale, self.bias, activation=activation, smooth=self.reader.smooth))


def integer_product(codes, packed, scale, zeros, zero):
    """(codes - zero) [...,K] times packed [K,N], times scale [N]: float32 [...,N], of exact integer sums."""
    rows = codes.view(-1, codes.shape[-1])  # [M,K]
    sums = torch.ops.onednn.qlinear_pointwise(rows, 1.0, zero, packed, scale, zeros, None, 1.0, 0, torch.float32,
                                              "none", [], "")
    return sums.view(*codes.shape[:-1], len(scale))


@functools.cache
def largest_weight():
    """127, or 64 where this CPU's instructions saturate at the sum of two products of 8 bits (x86 without VNNI)."""
    K, N, options = 512, 256, {"device": "cpu"}
    packed = torch.ops.onednn.qlinear_prepack(torch.full((N, K), 127, dtype=torch.int8, **options), None)
    scale, zeros = torch.ones(N, dtype=torch.float32, **options), torch.zeros(N, dtype=torch.int32, **options)
    for rows in (1, 64):  # 255 - ZERO is the largest code, and 2 * 255 * 127 more than 16 bits hold
        codes = torch.full((rows, K), 255, dtype=torch.uint8, **options)
        if not (integer_product(codes, packed, scale, zeros, ZERO) == (255 - ZERO) * 127 * K).all():
            return 64
    return 127
