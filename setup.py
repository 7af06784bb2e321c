"""Builds the native modules with ninja. No torch is needed here and none is linked.

difuse_kernels._native: every *_cpu.cpp once per instruction set, chosen at import by cpuid. Without a C++ compiler the
install goes on without the module; the reference path then runs alone and `difuse doctor` says so.
difuse_kernels._native_cuda: every *_cuda.cu for all GPUs at once, where nvcc is at hand, whether or not a GPU is. The
CUDA runtime is linked statically, so the module loads where there is no driver. DIFUSE_CUDA=0 leaves it out.
"""
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {  # namespace -> flags, oldest first
    "v2": "-march=x86-64-v2",
    "v3": "-march=x86-64-v3",
    "v4": "-march=x86-64-v4 -mprefer-vector-width=512",
    "v4_vnni": "-march=x86-64-v4 -mavx512vnni -mprefer-vector-width=512",
    "v4_bf16": "-march=x86-64-v4 -mavx512vnni -mavx512bf16 -mprefer-vector-width=512",
} if X86 else {"native_isa": ""}
# no -ffast-math: NaN and infinity keep their meaning. OpenMP is compiled in but not linked: see native.py
FLAGS = ("-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math "
         "-Wall -Wno-ignored-attributes -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized")  # GCC 12's own headers
GPUS = ("80", "90a", "100")  # machine code; PTX of the last, for GPUs to come
EMULATION = ROOT / "tests" / "emulation"


def cxx():
    """The C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if not compiler:
        raise FileNotFoundError("no C++ compiler: g++, c++ and clang++ are not on PATH and CXX is not set")
    return compiler


def host_compiler():
    """The C++ compiler as nvcc wants it: one program, without "ccache" before it or options behind it."""
    words = [word for word in shlex.split(cxx()) if not word.startswith("-") and shutil.which(word)]
    if not words:
        raise FileNotFoundError(f"CXX={cxx()!r} names no program that nvcc could call")
    return words[-1]


def nvcc():
    """CUDA's compiler."""
    if os.environ.get("DIFUSE_CUDA") == "0":
        raise FileNotFoundError("DIFUSE_CUDA=0")
    found = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise FileNotFoundError("no CUDA compiler: nvcc is not on PATH, and NVCC is not set")
    return found


def includes():
    """What the files that know Python include."""
    import pybind11

    return f"-I{CSRC} -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"


def write(folder, lines):
    """The build file made of `lines`, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_ninja(folder, output, isas=ISAS, extra=""):
    """Write build.ninja for the CPU module into `folder` and return its path."""
    tables = "-D'DIFUSE_TABLES(X)=" + " ".join(f"X({isa})" for isa in isas) + "'"
    lines = [
        f"cxx = {cxx()}",
        f"flags = {FLAGS} {includes()} {extra}",
        "rule compile\n  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx -shared -s $in -o $out",
    ]
    objects = []
    for isa, flags in isas.items():
        for source in sorted(CSRC.glob("*/*_cpu.cpp")):
            objects.append(f"{source.stem}.{isa}.o")
            lines.append(f"build {objects[-1]}: compile {source}\n  isa = {flags} -DDIFUSE_ISA={isa}")
    objects.append("bindings.o")
    lines.append(f"build bindings.o: compile {CSRC / 'bindings.cpp'}\n  isa = {tables}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    return write(folder, lines)


def architectures(compiler):
    """(nvcc's flags, their names) for the GPUs of GPUS that this nvcc knows, and PTX of the newest of them."""
    def ask(option):
        return subprocess.run([compiler, option], capture_output=True, text=True, check=True).stdout

    try:
        release, listed = re.search(r"release (\d+)", ask("--version")), ask("--list-gpu-arch").split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise FileNotFoundError(f"{compiler} does not run: {error}") from None
    known = [gpu for gpu in GPUS if f"compute_{gpu.rstrip('a')}" in listed]
    if not known or not release or int(release[1]) < 12:
        raise FileNotFoundError(f"{compiler} is older than CUDA 12, which the kernels need")
    pairs = [*((f"compute_{gpu}", f"sm_{gpu}") for gpu in known), (f"compute_{known[-1].rstrip('a')}",) * 2]
    flags = " ".join(f"-gencode arch={virtual},code={real}" for virtual, real in pairs)
    return flags, " ".join(real for _, real in pairs)


def write_cuda_ninja(folder, output):
    """Write build.ninja for the CUDA module into `folder` and return its path.

    What ptxas says of registers and spills is kept beside each object, as <name>.log.
    """
    compiler = nvcc()
    flags, names = architectures(compiler)
    lines = [
        f"nvcc = {compiler} -ccbin {host_compiler()}",
        f"flags = -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall {includes()}",
        f"gpus = {flags} -Xptxas -v -DDIFUSE_ARCHITECTURES='\"{names}\"'",
        "rule gpu\n  command = $nvcc $flags $gpus -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || "
        "{ cat $out.log; exit 1; }\n  depfile = $out.d\n  deps = gcc",
        "rule host\n  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $nvcc -shared -cudart static -Xlinker -s $in -o $out",
    ]
    sources = sorted(CSRC.glob("*/*_cuda.cu"))
    lines += [f"build {source.stem}.o: gpu {source}" for source in sources]
    lines.append(f"build bindings_cuda.o: host {CSRC / 'bindings_cuda.cpp'}")
    lines.append(f"build {output}: link bindings_cuda.o {' '.join(f'{source.stem}.o' for source in sources)}")
    return write(folder, lines)


def write_emulated_ninja(folder, output, extra="", sources=None):
    """Write build.ninja for the CUDA module as tests run it without a GPU: the same sources through the C++ compiler.

    The emulation begins and ends what __shared__ declares, so it is linked in two parts around `sources`.
    """
    lines = [
        f"cxx = {cxx()}",
        f"flags = -std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -I{EMULATION} {includes()} -DDIFUSE_EMULATED "
        f"-DDIFUSE_ARCHITECTURES='\"emulated\"' {extra}",
        "rule compile\n  command = $cxx $flags -x c++ -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx -shared {extra} $in -o $out",
    ]
    sources = [EMULATION / "emulation.cpp", *(sources or sorted(CSRC.glob("*/*_cuda.cu"))),
               EMULATION / "shared_end.cpp", *([] if sources else [CSRC / "bindings_cuda.cpp"])]
    lines += [f"build {source.stem}.o: compile {source}" for source in sources]
    lines.append(f"build {output}: link {' '.join(f'{source.stem}.o' for source in sources)}")
    return write(folder, lines)


class BuildNative(build_ext):
    """Runs ninja; a missing compiler is reported and survived, a compile error is not."""

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = ext.name.rpartition(".")[2]
        cuda = name == "_native_cuda"
        try:
            ninja_file = (write_cuda_ninja if cuda else write_ninja)(Path(self.build_temp).resolve() / name, output)
        except FileNotFoundError as error:
            print(f"difuse: built without the {'CUDA C++' if cuda else 'C++'} kernels: {error}", file=sys.stderr)
            for stale in (output, ROOT / "kernels" / "difuse_kernels" / output.name):  # an earlier build's
                stale.unlink(missing_ok=True)
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja") or f"{sys.executable} -m ninja"
        done = subprocess.run([*ninja.split(), "-C", str(ninja_file.parent)])
        if done.returncode:
            hint = "; DIFUSE_CUDA=0 installs without the CUDA C++ kernels" if cuda else ""
            sys.exit(f"difuse: the {name} module could not be built, see above{hint}")

    def copy_extensions_to_source(self):
        built = [ext for ext in self.extensions if Path(self.build_lib, self.get_ext_filename(ext.name)).exists()]
        self.extensions = built
        super().copy_extensions_to_source()

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]


MODULES = ("difuse_kernels._native", "difuse_kernels._native_cuda")
setup(ext_modules=[Extension(name, sources=[]) for name in MODULES], cmdclass={"build_ext": BuildNative})
