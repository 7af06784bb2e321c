"""The error budget: how far a kernel may be from the truth, given how far eager PyTorch is.

    rms |ours - oracle| <= 1.5 * rms |eager - oracle| + one rounding of the rms of the oracle
    max |ours - oracle| <= 4 * max |eager - oracle| + one rounding of the oracle's largest value

oracle: the reference in float64 on the same (rounded) inputs; eager: `testing/eager.py` in the dtype under test. The
rms line catches a kernel that is worse throughout, the max line a single wrong element. A largest error is mostly
luck: over 40 seeds it differed by up to 2.4 times between sums over 7 tokens of equal accuracy (rms ratio 0.99).
"""
from dataclasses import dataclass

import torch

import difuse_kernels
from difuse_kernels import native_cuda
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.case import Maker, outgoing
from difuse_kernels.testing.eager import EAGER
from difuse_kernels.triton_launch import INTERPRETED

FACTOR = 1.5  # of the rms
OUTLIER = 4  # of the largest error


@dataclass(frozen=True)
class Line:
    """One compared tensor: an output ("out0") or the gradient of a leaf ("grad x")."""

    name: str
    rms: float
    eager_rms: float
    largest_error: float
    eager_largest_error: float
    oracle_rms: float
    largest: float  # the oracle's largest magnitude
    unit: float  # the largest relative error of one rounding in ours' dtype
    finite: bool
    size: int  # elements

    @property
    def ok(self):
        """Whether both errors are within the budget."""
        return (self.finite and self.rms <= FACTOR * self.eager_rms + self.unit * self.oracle_rms
                and self.largest_error <= OUTLIER * self.eager_largest_error + self.unit * self.largest)


def run(function, case, dtype, *, work=None, only=None, grads=True, device="cpu", **keywords):
    """(outputs, {leaf: gradient}) of one call of `function` on the case. Gradients are of a random scalar product."""
    make = Maker(dtype, work=work, only=only, device=device)
    args, kwargs = case.build(make)
    outputs = function(*args, **kwargs, **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = {name: leaf for name, leaf in make.leaves.items() if leaf.requires_grad} if grads else {}
    if not leaves:
        return outputs, {}
    incoming = [outgoing(out, case.grad, seed=100 * (i + 1), only=only) for i, out in enumerate(outputs)]
    found = torch.autograd.grad(outputs, list(leaves.values()), incoming, allow_unused=True)
    return outputs, {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def oracle(case, dtype, *, outputs, grads=True, device="cpu"):
    """The reference in float64 on the values that `dtype` holds, incoming gradients rounded like `outputs`."""
    reference = getattr(difuse_kernels, case.op)
    make = Maker(dtype, work=torch.float64, device=device)
    args, kwargs = case.build(make)
    kwargs.pop("out_dtypes", None)
    truth = reference(*args, **kwargs, backend="reference")
    truth = truth if isinstance(truth, tuple) else (truth,)
    leaves = {name: leaf for name, leaf in make.leaves.items() if leaf.requires_grad} if grads else {}
    if not leaves:
        return truth, {}
    incoming = [outgoing(out, case.grad, seed=100 * (i + 1), work=torch.float64) for i, out in enumerate(outputs)]
    found = torch.autograd.grad(truth, list(leaves.values()), incoming, allow_unused=True)
    return truth, {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def compare(name, ours, eager, truth):
    """A Line for one tensor."""
    unit = torch.finfo(ours.dtype).eps / 2
    if truth.numel() == 0 or ours.shape != truth.shape:
        return Line(name, 0, 0, 0, 0, 0, 0, unit, finite=ours.shape == truth.shape, size=truth.numel())
    ours, eager, truth = ours.double(), eager.double(), truth.double()

    def size(error):
        return error.square().mean().sqrt().item(), error.abs().max().item()

    (rms, largest_error), (eager_rms, eager_largest), (oracle_rms, largest) = map(
        size, (ours - truth, eager - truth, truth))
    return Line(name, rms, eager_rms, largest_error, eager_largest, oracle_rms, largest, unit,
                bool(torch.isfinite(ours).all()), truth.numel())


def check_case(case, dtype, backend, grads=True):
    """Lines for every output and gradient of the case on `backend`. The caller asserts `line.ok`."""
    op, device = getattr(difuse_kernels, case.op), device_of(backend)
    ours, our_grads = run(op, case, dtype, grads=grads, device=device, backend=backend)
    eager, eager_grads = run(EAGER[case.op], case, dtype, grads=grads, device=device)
    truth, true_grads = oracle(case, dtype, outputs=ours, grads=grads, device=device)
    if set(our_grads) != set(true_grads):
        raise AssertionError(f"{case}: gradients for {sorted(our_grads)}, expected {sorted(true_grads)}")
    lines = [compare(f"out{i}", *row) for i, row in enumerate(zip(ours, eager, truth, strict=True))]
    lines += [compare(f"grad {n}", our_grads[n], eager_grads[n], g) for n, g in true_grads.items()]
    return lines


def backends_here(op):
    """The backends that can run `op` on this machine, the reference first."""
    return [name for name in OPS[op].backends if OPS[op].missing(name) is None]


def device_of(backend):
    """Where `backend` is tested: kernels for GPUs on the GPU, or interpreted or emulated on CPU tensors."""
    on_gpu = {"triton": not INTERPRETED, "cuda": native_cuda.ext is not None and not native_cuda.ext.emulated}
    return "cuda" if on_gpu.get(backend) else "cpu"
