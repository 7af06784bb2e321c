"""Without a GPU, kernels for GPUs are tested on CPU tensors: the Triton ones in Triton's interpreter, chosen before
Triton loads, the CUDA ones through tests/emulation, loaded in place of the real module."""
import os

import pytest
import torch

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # threads that fight for the cores spin at barriers
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests.emulation import build

    if build.missing() is None:
        build.load("difuse_kernels._native_cuda")
else:
    from benchmarks.gpu_pytest import pytest_runtest_call  # noqa: F401  a hook: such tests' tensors go to the GPU


@pytest.fixture
def records(monkeypatch):
    """The devices that were recorded on; without a GPU, recording is pretended."""
    from difuse.inference import graphs  # not before the lines above have run

    seen, real = [], graphs.record

    def record(function, device):
        seen.append(device)
        if torch.cuda.is_available():
            return real(function, device)
        function()  # as the warm-up does; a graph under capture runs nothing
        return function

    monkeypatch.setattr(graphs, "record", record)
    return seen
