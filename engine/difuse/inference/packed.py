"""Matrix products of a frozen model, on weights packed once, in one of three precisions."""
import torch
from torch import nn

from difuse_kernels import Codes, native, pack_linear, packed_linear

_ACTIVATION = {None: "none", "none": "gelu", "tanh": "gelu_tanh"}  # by nn.GELU's `approximate`


def multiplies_bfloat16():
    """Whether our kernels have this CPU's instruction for products of bfloat16."""
    return native.ext is not None and native.ext.isa() == "v4_bf16"


class PackedProduct(nn.Module):
    """x [...,K] -> [...,N]: the nn.Linear it was made from, and perhaps a GELU.

    precision: of the operands, see `pack_linear`; sums, bias and GELU are float32. smooth: float32 [K] of "int8", or
    None. gelu: "tanh" or "none" (exact), as of nn.GELU, or None for no activation. out_dtype: of the results,
    torch.float32 unless their only reader rounds them to torch.bfloat16 anyway. reader: the 8-bit product that alone
    takes the results, as codes, or None.
    """

    def __init__(self, linear, precision="fp32", smooth=None):
        super().__init__()
        self.in_features, self.out_features, self.precision = linear.in_features, linear.out_features, precision
        self.gelu, self.out_dtype = None, torch.float32
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty_like(linear.bias), requires_grad=False)
        self.times_packed = 0  # tells `cache_conditioning` that the weight is another one
        self.read_by(None)
        self.pack(linear, smooth)

    def read_by(self, reader):
        """From now on hand codes to `reader`, the 8-bit product that alone reads this one's results."""
        object.__setattr__(self, "reader", reader)  # a neighbour, no submodule

    def pack(self, linear, smooth=None):
        """Read the weight and bias of `linear` again; the smoothing stays if none is given."""
        if smooth is None and self.times_packed:
            smooth = self.packed.smooth
        # no buffers: they must stay as they are when the model is moved or converted
        self.packed = pack_linear(linear.weight, self.precision, smooth)
        self.times_packed += 1
        if self.bias is not None:
            self.bias.data.copy_(linear.bias.detach())

    @property
    def weight(self):
        """[N,K], unpacked anew at every access, for those who read it: slow, and nobody's gradient."""
        return self.packed.dense()

    def tensors(self):
        """All that it holds."""
        return [*self.packed.tensors(), *(() if self.bias is None else (self.bias,))]

    @property
    def activation(self):
        """The name that `packed_linear` has for the GELU."""
        return _ACTIVATION[self.gelu]

    def forward(self, x):
        """Raises TypeError for another dtype, RuntimeError where a gradient is asked for."""
        if not isinstance(x, Codes):
            if x.dtype != torch.float32 and not (x.dtype == torch.bfloat16 and self.precision != "fp32"):
                raise TypeError(f"a frozen model's product got {x.dtype}; expected torch.float32. Convert the inputs "
                                "with .float(), and call it outside of torch.autocast")
            if torch.is_grad_enabled() and x.requires_grad:
                raise RuntimeError("a frozen model has no gradients; call it under torch.no_grad()")
        return packed_linear(x, self.packed, self.bias, activation=self.activation, out_dtype=self.out_dtype,
                             reader=self.reader and self.reader.packed)  # [...,N]

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, {self.precision}, gelu={self.gelu}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise RuntimeError("a frozen model's weights are packed for this machine; save the model it was made from")
