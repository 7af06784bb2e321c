"""Named cases: the inputs that tests and benchmarks give to an op."""
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One call of one op.

    `build(make)` returns (args, kwargs) for the public function, every tensor drawn from `make`; `why` names the code
    path it guards. `grad` is how the incoming gradient lies in memory. `speed` cases are large: benchmarks time them
    (after the same correctness check) and the contract suite leaves them out.
    """

    op: str
    name: str
    build: Callable
    why: str
    grad: str = "dense"  # "dense" | "transposed" | "expanded"
    speed: bool = False
    refused_by: tuple = ()  # backends that have the op and do not take this case

    def __str__(self):
        return f"{self.op}-{self.name}"


class Maker:
    """Draws the tensors of a case, the same values in every dtype of computation.

    Values are drawn in float64, rounded to the dtype under test and handed out in `work` (the same dtype, or float64
    for the oracle). Leaves that may need a gradient are kept in `leaves`. With `only=b` a batched leaf holds sample b
    alone, so that the same case is built for one sample.
    """

    def __init__(self, dtype, work=None, seed=0, only=None, device="cpu"):
        self.dtype, self.work, self.only, self.device = dtype, work, only, device
        self.generator = torch.Generator().manual_seed(seed)
        self.leaves = {}
        self.shared = set()  # names of leaves without a batch dimension

    def __call__(self, name, *shape, dtype=None, scale=1.0, mean=0.0, batched=True, grad=True):
        """A random normal leaf. `dtype` overrides the dtype under test (mixed dtypes)."""
        dtype = dtype or self.dtype
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale + mean
        values = values.to(dtype)
        if self.only is not None and batched:
            values = values[self.only : self.only + 1].clone()
        leaf = values.to(self.work or dtype).to(self.device).requires_grad_(grad)
        self.leaves[name] = leaf
        if not batched:
            self.shared.add(name)
        return leaf

    def constant(self, values, batched=True):
        """A tensor that is neither rounded nor differentiated, e.g. key lengths."""
        values = torch.as_tensor(values, device=self.device)
        return values[self.only : self.only + 1] if self.only is not None and batched else values


def outgoing(output, layout, seed=1, only=None, work=None):
    """A random gradient for `output`, lying in memory as `layout` says; sample `only` of the whole batch's gradient.

    Drawn on the output's device (a GPU's production shapes take minutes on a CPU), sample by sample, so that sample
    b's gradient does not depend on the batch.
    """
    batch = 1 if output.dim() == 0 else output.shape[0]
    generator = torch.Generator().manual_seed(seed)
    shape, device = list(output.shape), output.device
    if layout == "expanded":  # what loss.sum() hands back: one number with stride 0
        value = torch.randn((), generator=generator, dtype=torch.float64)
        return value.to(output.dtype).to(work or output.dtype).to(output.device).expand(output.shape)
    rows = [torch.randn(shape[1:], generator=torch.Generator(device).manual_seed(seed + b), dtype=torch.float64,
                        device=device) for b in (range(batch) if only is None else [only])]
    grad = torch.stack(rows) if rows else torch.zeros(shape, dtype=torch.float64, device=device)
    grad = grad.to(output.dtype).to(work or output.dtype)
    if layout == "transposed" and grad.dim() > 1:
        grad = grad.transpose(-1, -2).contiguous().transpose(-1, -2)
    return grad
