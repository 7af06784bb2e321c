"""Without a GPU, kernels for GPUs are tested on CPU tensors: the Triton ones in Triton's interpreter, chosen before
Triton loads, the CUDA ones through tests/emulation, loaded in place of the real module."""
import os

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
