"""The native module as a binary: what it links, whose threads it uses, every instruction set, no compiler at hand.

Each check runs in a fresh process, because what is loaded and chosen at import cannot be undone in this one.
"""
import json
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from difuse_kernels import native

ROOT = Path(__file__).parent.parent
needs_native = pytest.mark.skipif(native.ext is None, reason=f"no native module: {native.missing()}")

CHECK = """
import sys, torch
from difuse_kernels import native
from difuse_kernels.testing.cases import cases
from difuse_kernels.testing.numerics import check_case
ran, wrong = set(), []
for case in cases():
    if case.op in sys.argv[1:]:
        ran.add(case.op)
        for dtype in (torch.float32, torch.bfloat16):
            lines = check_case(case, dtype, "cpu")
            with torch.no_grad():  # attention then stays in bfloat16 where the CPU multiplies it
                lines += check_case(case, dtype, "cpu", grads=False)
            wrong += [(str(case), dtype, line) for line in lines if not line.ok]
assert not wrong, wrong
print(native.ext.isa(), *sorted(ran))
"""
ALL_OPS = ["attention", "attention_packed", "gate_residual", "gate_residual_norm_modulate", "gated_activation",
           "gelu_tanh", "gram", "group_norm_act", "norm_modulate", "norm_modulate_dual", "patchify", "qk_norm_rope",
           "qk_norm_rope_joint", "sampler_step", "unpatchify"]


def fresh(code, *arguments, **environment):
    """Run `code` in a new interpreter; (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env={**os.environ, **environment},
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def needed_libraries(path):
    """The DT_NEEDED entries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is no 64-bit little-endian ELF file"
    (offset,), (entry, count) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * entry) for i in range(count)]
    (dynamic,) = (s for s in sections if s[1] == 6)  # SHT_DYNAMIC
    strings = sections[dynamic[6]][4]  # offset of the string table it links to
    names = []
    for at in range(dynamic[4], dynamic[4] + dynamic[5], 16):
        tag, value = struct.unpack_from("<QQ", data, at)
        if tag == 1:  # DT_NEEDED
            start = strings + value
            names.append(data[start : data.index(b"\0", start)].decode())
    return names


@needs_native
def test_links_neither_torch_nor_an_openmp_runtime_nor_cuda():
    needed = needed_libraries(Path(native.ext.__file__))
    assert any(name.startswith("libc.so") for name in needed)  # the reader reads
    assert not [name for name in needed if re.search(r"torch|c10|omp|cuda|mkl|python", name)], needed


@needs_native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_readelf_sees_the_same():
    listing = subprocess.run(["readelf", "-d", native.ext.__file__], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\(NEEDED\).*\[(.*)\]", listing) == needed_libraries(Path(native.ext.__file__))


@needs_native
def test_one_openmp_runtime_and_torch_set_num_threads_rules():
    status, out, err = fresh("""
import json, os, re, torch
from difuse_kernels import norm_modulate
x = torch.randn(4, 256, 64)
tasks = lambda: len(os.listdir("/proc/self/task"))
start = tasks()
torch.set_num_threads(1)
norm_modulate(x, backend="cpu")
before = tasks() - start
torch.set_num_threads(3)
norm_modulate(x, backend="cpu")
maps = open("/proc/self/maps").read()
runtimes = sorted(set(re.findall(r"(/\\S*/lib(?:g|i)?omp\\S*)", maps)))
print(json.dumps([before, tasks() - start, runtimes, "_native" in maps]))
""")
    assert status == 0, err
    before, after, runtimes, loaded = json.loads(out)
    assert loaded and len(runtimes) == 1, runtimes
    assert before == 0 and after == 2  # threads beyond the first


@needs_native
@pytest.mark.parametrize("isa", ["v2", "v3", "v4", "v4_vnni", "v4_bf16", "nonsense"])
def test_every_instruction_set_runs_or_says_why_not(isa):
    """The same error budget holds for each, so they are within rounding of each other."""
    if isa != "nonsense" and isa not in native.ext.isas():
        pytest.skip(f"this build holds {native.ext.isas()}")
    flags = set(re.search(r"flags\s*:(.*)", Path("/proc/cpuinfo").read_text())[1].split())
    wants = {"v2": {"sse4_2"}, "v3": {"avx2", "fma"}, "v4": {"avx512bw", "avx512vl"},
             "v4_vnni": {"avx512bw", "avx512_vnni"}, "v4_bf16": {"avx512bw", "avx512_vnni", "avx512_bf16"}}
    ops = ["gate_residual_norm_modulate", "gram", "norm_modulate", "patchify", "sampler_step"]
    if isa == native.ext.isa():
        ops = ["sampler_step"]  # the contract suite runs all of them on it
    elif isa == "v4_bf16":
        ops = ["attention", *ops]
    status, out, err = fresh(CHECK, *ops, DIFUSE_ISA=isa)
    if isa in wants and wants[isa] <= flags:
        assert status == 0, err
        assert out.split() == [isa, *ops]
    else:
        assert status != 0
        assert f"ImportError: difuse_kernels: DIFUSE_ISA={isa} cannot run here; this build and CPU support: v2" in err


@needs_native
@pytest.mark.parametrize("isa", ["v2", "v3", "v4", "v4_vnni"])
def test_packed_products_and_blocks_on_every_instruction_set(isa):
    """Theirs are the tests of what frozen models do; the newest set is the one that all of them run on."""
    if isa not in native.ext.isas() or isa == native.ext.isa():
        pytest.skip(f"here are {native.ext.isas()}, and {native.ext.isa()} runs anyway")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_linear.py",
         "tests/test_dit_block.py", "-k", "norm_before_and_gate or codes_for_a_reader or errs_no_more or of_its_parts"],
        cwd=ROOT, env={**os.environ, "DIFUSE_ISA": isa}, capture_output=True, text=True)
    if done.returncode:
        assert f"DIFUSE_ISA={isa} cannot run here" in done.stdout + done.stderr, done.stdout


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A build of every kernel for x86-64-v3 as on AVX-512: 16 lanes, products of bfloat16 pairs; quick, if slow."""
    if native.ext is None or "v3" not in native.ext.isas() or native.ext.isa() == "v2":
        pytest.skip("needs a native build on a CPU with AVX2")
    if not (shutil.which("g++") or shutil.which("c++") or os.environ.get("CXX")):
        pytest.skip("no C++ compiler")
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    with mock.patch("setuptools.setup"):
        setup = runpy.run_path(str(ROOT / "setup.py"))
    folder = tmp_path_factory.mktemp("wide")
    module = folder / Path(native.ext.__file__).name
    setup["write_ninja"](folder, module, {"v3": setup["ISAS"]["v3"]}, "-O1 -DDIFUSE_VL=16 -DDIFUSE_BF16_DOTS")
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return module


@pytest.mark.slow
def test_sixteen_lanes(wide):
    """The AVX-512 shape of every loop, and attention on pairs of bfloat16, run on any AVX2 machine."""
    replace = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("difuse_kernels._native", {str(wide)!r})
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
"""
    check = f"assert native.ext.__file__ == {str(wide)!r}\n"
    status, out, err = fresh(replace + CHECK + check, *ALL_OPS, DIFUSE_ISA="")
    assert status == 0, err
    assert out.split() == ["v3", *ALL_OPS]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_no_symbol_that_the_linker_could_merge_across_instruction_sets(wide):
    """A weak function compiled for AVX-512 must never stand in for one compiled for an older CPU."""
    objects = sorted(wide.parent.glob("*_cpu.v3.o"))
    assert len(objects) >= len(list((ROOT / "csrc").glob("*/*_cpu.cpp")))
    for path in objects:
        symbols = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
        assert any("difuse2v3" in line for line in symbols)
        shared = [line for line in symbols if line[17] in "WVu" and "6difuse2v3" not in line]
        assert set(line[19:] for line in shared) <= {"DW.ref.__gxx_personality_v0"}, path.name  # a pointer, not code


@pytest.mark.slow
def test_install_without_a_compiler_leaves_a_working_reference(tmp_path):
    pytest.importorskip("pybind11")
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is too old for pyproject.toml, which asks for 77")
    tree = tmp_path / "tree"
    leave = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "engine", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    tools = tmp_path / "tools"  # a PATH with nothing on it
    tools.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."],
        cwd=tree, env={**environment, "PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "difuse: built without the C++ kernels: no C++ compiler" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    status, out, err = fresh("""
import sys, warnings, torch
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import difuse_kernels
from difuse_kernels import native, norm_modulate
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    norm_modulate(torch.randn(2, 3, 8)), norm_modulate(torch.randn(2, 3, 8))
print(difuse_kernels.__file__, native.missing(), [str(w.message) for w in caught], sep="\\n")
""", PYTHONPATH=str(tmp_path / "site"))
    assert status == 0, err
    where, missing, warned = out.splitlines()
    assert where.startswith(str(tmp_path / "site"))
    assert "the C++ extension is not loaded" in missing and "reinstall with a C++17 compiler" in missing
    assert warned.count("difuse: norm_modulate runs on 'reference', not on 'cpu'") == 1
