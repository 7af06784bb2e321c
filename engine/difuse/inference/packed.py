"""A matrix product of a frozen model: oneDNN's, on a weight that was packed once."""
import torch
from torch import nn


class PackedProduct(nn.Module):
    """x [...,K] -> [...,N]: the nn.Linear it was made from, in float32, and perhaps a GELU in the same pass.

    gelu: "tanh" or "none" (exact), as of nn.GELU, or None for no activation.
    """

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.gelu = None
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.times_packed = 0  # tells `cache_conditioning` that the weight is another one
        self.pack(linear)

    def pack(self, linear):
        """Read the weight and bias of `linear` again."""
        # no buffer: it must stay as it is when the model is moved or converted
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous())
        self.times_packed += 1
        if self.bias is not None:
            self.bias.data.copy_(linear.bias.detach())

    @property
    def weight(self):
        """[N,K], unpacked anew at every access, for those who read it: slow, and nobody's gradient."""
        return self.packed.to_dense()

    def forward(self, x):
        """Raises TypeError for what is not float32, RuntimeError where a gradient is asked for."""
        if x.dtype != torch.float32:
            raise TypeError(f"a frozen model's product got {x.dtype}; expected torch.float32. Convert the inputs with "
                            ".float(), and call it outside of torch.autocast")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a frozen model has no gradients; call it under torch.no_grad()")
        name, algorithm = ("none", "") if self.gelu is None else ("gelu", self.gelu)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)  # [...,N]

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, gelu={self.gelu}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise RuntimeError("a frozen model's weights are packed for this machine; save the model it was made from")
