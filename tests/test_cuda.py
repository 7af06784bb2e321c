"""The CUDA C++ backend beside its results, which the contract suite checks: refusals, and the report on the binary."""
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import difuse_kernels
from benchmarks import cuda_report
from difuse_kernels import native_cuda, norm_modulate
from difuse_kernels.dispatch import OPS, ORDER

ROOT = Path(__file__).parent.parent
HAS_GPU = torch.cuda.is_available()
needs_emulation = pytest.mark.skipif(HAS_GPU or native_cuda.missing() is not None, reason="a GPU is here, or no g++")
CALL = """
import sys, torch
{before}
import difuse_kernels
difuse_kernels.norm_modulate(torch.ones(1, 2, 8), backend="cuda")
"""


def refusal(before):
    """The last line that a fresh process prints when it asks for the CUDA backend on a CPU tensor."""
    done = subprocess.run([sys.executable, "-c", CALL.format(before=before)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_without_the_module():
    text = refusal("sys.modules['difuse_kernels._native_cuda'] = None")
    assert text.startswith("RuntimeError: norm_modulate: backend 'cuda' cannot run inputs [(1, 2, 8) torch.float32")
    assert "cuda: the CUDA C++ extension is not loaded (" in text and "reinstall with CUDA's compiler at hand" in text


@pytest.mark.skipif(HAS_GPU or cuda_report.module() is None, reason="a GPU is here, or the module is not built")
def test_the_module_loads_without_a_driver_and_says_so():
    text = refusal("")
    assert "cuda: no NVIDIA driver is loaded" in text and "cpu: ready" in text


@pytest.mark.skipif(HAS_GPU or cuda_report.module() is None, reason="a GPU is here, or the module is not built")
def test_a_driver_that_torch_cannot_use_is_named():
    assert "torch sees no NVIDIA GPU; install a torch that is built with CUDA" in refusal("""
from difuse_kernels import native_cuda, _native_cuda
class Ext:
    emulated = False
    missing = staticmethod(lambda: "")
import difuse_kernels
sys.modules['difuse_kernels._native_cuda'] = difuse_kernels._native_cuda = Ext""")


def test_the_order_is_data_and_names_cuda_first():
    assert ORDER["cuda"] == ("cuda", "triton", "reference")
    assert {op.name for op in OPS.values() if "cuda" not in op.backends} == {
        "attention", "attention_packed", "gelu_tanh", "gram", "norm_modulate_dual", "group_norm_act"}


@needs_emulation
def test_tensors_elsewhere_are_refused(monkeypatch):
    x, m = torch.ones(1, 2, 8), torch.ones(1, 8)
    with pytest.raises(ValueError, match="norm_modulate: inputs are on cpu and meta; move them to one device"):
        norm_modulate(x, m.to("meta"), backend="cuda")
    with pytest.raises(RuntimeError, match="cuda: input 0 is on meta"):
        norm_modulate(x.to("meta"), m.to("meta"), backend="cuda")

    class Real:
        emulated = False

    monkeypatch.setattr(native_cuda, "ext", Real)
    with pytest.raises(RuntimeError, match="cuda: input 0 is on cpu"):
        norm_modulate(x, m, backend="cuda")


@pytest.mark.parametrize("capability, words", [
    ((7, 5), "the GPU is sm_75; the CUDA C++ kernels need sm_80 or newer"), ((8, 0), None), ((9, 0), None),
    ((12, 0), None)])
def test_a_gpu_older_than_the_build_is_refused(capability, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(native_cuda, "_refusals", {})
    assert native_cuda._why_not_device(0) == words


@needs_emulation
def test_another_accelerators_tensors_are_refused():
    """Their numbers start at 0 too."""
    x = SimpleNamespace(get_device=lambda: 0, is_cuda=False, is_cpu=False, dtype=torch.float32, shape=(1, 2, 8),
                        is_contiguous=lambda: True, device=SimpleNamespace(type="xpu"))
    assert native_cuda.unsupported((x, None)) == "input 0 is on xpu"


@needs_emulation
def test_double_precision_and_strided_rows_are_refused():
    with pytest.raises(RuntimeError, match="cuda: input 0 has dtype torch.float64"):
        norm_modulate(torch.ones(1, 2, 8).double(), backend="cuda")
    with pytest.raises(RuntimeError, match="cuda: the last dimension of input 0 is strided"):
        norm_modulate(torch.ones(1, 2, 16)[..., ::2], backend="cuda")


@needs_emulation
def test_attention_has_no_cuda_kernel_and_says_so():
    q = torch.ones(1, 2, 1, 8)
    with pytest.raises(RuntimeError, match="cuda: not written for this op yet"):
        difuse_kernels.attention(q, q, q, backend="cuda")


@pytest.fixture(scope="module")
def setup():
    """The names in setup.py, which sets nothing up."""
    pytest.importorskip("setuptools")
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("cxx", ["g++", "env g++", "g++ -pthread"])
def test_nvcc_gets_a_compiler_and_nothing_else(setup, cxx, monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    assert setup["host_compiler"]() == "g++"


def test_the_build_leaves_cuda_out_when_told_to(setup, monkeypatch):
    monkeypatch.setenv("DIFUSE_CUDA", "0")
    with pytest.raises(FileNotFoundError, match="DIFUSE_CUDA=0"):
        setup["nvcc"]()


@pytest.mark.parametrize("release, listed, expected", [
    ("11.8", "compute_80 compute_90", None), ("12.4", "compute_75 compute_80 compute_90", "sm_80 sm_90a compute_90"),
    ("13.0", "compute_80 compute_90 compute_100 compute_120", "sm_80 sm_90a sm_100 compute_100"),
    ("12.4", "compute_50", None)])
def test_the_build_holds_what_this_nvcc_knows(setup, tmp_path, release, listed, expected):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'release {release}, V1' || echo '{listed}'\n")
    nvcc.chmod(0o755)
    if expected is None:
        with pytest.raises(FileNotFoundError, match="older than CUDA 12"):
            setup["architectures"](str(nvcc))
    else:
        flags, names = setup["architectures"](str(nvcc))
        assert names == expected and flags.count("-gencode") == len(names.split())
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(FileNotFoundError, match="does not run"):
        setup["architectures"](str(nvcc))


ROW = {"op": "adaln", "name": "forward<float>", "arch": "sm_80", "registers": 40, "stack": 0, "shared": 0, "local": {},
       "instructions": 9, "loads": {"128": 2}, "stores": {"128": 1, "32": 2}, "LDS": 4, "STS": 1}


def rows(**changes):
    """A report of one good kernel per op and architecture, the first changed."""
    found = [ROW | {"op": op, "arch": arch} for op in cuda_report.OPS for arch in cuda_report.ARCHITECTURES]
    return [found[0] | changes, *found[1:]]


@pytest.mark.parametrize("changes, words", [
    ({"stack": 16}, "16 bytes of local memory"), ({"local": {"STL": 1}}, "accesses {'STL': 1}"),
    ({"stores": {"32": 4}}, "loads 128 bits, stores {'32': 4}"), ({"loads": {"32": 1}}, "no kernel with 128-bit"),
    ({"STS": 0}, "reads shared memory and never writes it"),
    ({"arch": "sm_90a"}, "adaln on sm_80: no kernel with 128-bit")])
def test_the_report_fails_on(changes, words):
    assert cuda_report.problems(rows()) == []
    found = cuda_report.problems(rows(**changes))
    assert found and words in found[0] and "adaln" in cuda_report.table(rows(**changes))


def test_the_report_reads_cuobjdump():
    text = """
Fatbin elf code:
arch = sm_90a
\t\tFunction : _ZN6difuse4cuda57_GLOBAL__N__aa412172_24_gated_activation_cuda_cu_5894c7404gateIfLi4ELb1EEEvNS1_4GateE
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   EXIT ;
"""
    ((key, listing),) = cuda_report.sections(text).items()
    assert key[0] == "sm_90a" and cuda_report._SOURCE.search(key[1])[1] == "gated_activation"
    assert "LDG.E.128" in listing and "Fatbin" not in listing
