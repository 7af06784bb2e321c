"""What takes the place of a frozen model's layers: packed products, and modulations that are known beforehand."""
import weakref

import torch
import torch.nn.functional as F
from torch import nn


class PackedLinear(nn.Module):
    """x [...,K] -> [...,N]: nn.Linear with its weight in oneDNN's own layout, and perhaps a GELU in the same pass.

    gelu: "tanh" or "none" (exact), as of nn.GELU, or None for no activation.
    """

    def __init__(self, linear, gelu=None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation = ("none", "") if gelu is None else ("gelu", gelu)
        self.times_packed = 0  # tells `cache_conditioning` that the weight is another one
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty(self.out_features), requires_grad=False)
        self.pack(linear)

    def pack(self, linear):
        """Read the weight and bias of `linear` again, as float32."""
        # no buffer: it must stay as it is when the model is moved or converted
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().float().contiguous())
        self.times_packed += 1
        if self.bias is not None:
            self.bias.data.copy_(linear.bias)

    def forward(self, x):
        name, algorithm = self.activation
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, activation={' '.join(self.activation).strip()}"


class Known:
    """Conditionings [n,D] of a trajectory, whose modulations are computed before its loop."""

    def __init__(self):
        self.conditionings, self._last = None, (None, None, None)

    def rows(self, c):
        """Which of the known conditionings the rows of c [B,D] are, or None if one is not among them."""
        if self.conditionings is None or c.shape[1:] != self.conditionings.shape[1:]:
            return None
        last, version, rows = self._last
        if last is None or last() is not c or version != c._version:  # every block asks for the same tensor
            equal = (c[:, None] == self.conditionings).all(-1)  # [B,n]
            rows = equal.int().argmax(1) if equal.any(1).all() else None
            self._last = weakref.ref(c), c._version, rows
        return rows


class Modulation(nn.Module):
    """c [B,D] -> [B,k*D]: Linear(SiLU(c)), looked up where the conditioning is known."""

    def __init__(self, linear, known):
        super().__init__()
        self.linear, self.known, self.table = linear, known, None

    def hoist(self):
        """Compute the rows of all known conditionings, reading the weight once."""
        self.table = None if self.known.conditionings is None else self.compute(self.known.conditionings)  # [n,k*D]

    def compute(self, c):
        return self.linear(F.silu(c))

    def forward(self, c):
        rows = None if self.table is None else self.known.rows(c)
        return self.compute(c) if rows is None else self.table[rows]
