"""A pytest plugin of the hardware suite: tests of a GPU's backend make their tensors on the GPU.

Tests that take a `backend` draw their inputs with generators of the CPU, so that the numbers are the same everywhere.
Where kernels are interpreted or emulated that is where they run; on a GPU, what such a test makes is moved there.
"""
import pytest
import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint,
             torch.randn, torch.tensor, torch.zeros}


class Made(TorchFunctionMode):
    """Inside the block new tensors are handed out on `device`, unless another is asked for."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in FACTORIES and not (kwargs or {}).get("device"):
            return result.detach().to(self.device).requires_grad_(result.requires_grad)
        return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Around every test with a `backend` among its parameters."""
    backend = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
    if backend not in ("triton", "cuda"):
        return (yield)
    from difuse_kernels.testing.numerics import device_of  # not before conftest.py has chosen the interpreter

    with Made(device_of(backend)):
        return (yield)
