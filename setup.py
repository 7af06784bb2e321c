"""Builds difuse_kernels._native with ninja: every *_cpu.cpp once per instruction set, chosen at import by cpuid.

No torch is needed here and none is linked. Without a C++ compiler the install goes on without the module; the
reference path then runs alone and `difuse doctor` says so.
"""
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {  # namespace -> flags, oldest first
    "v2": "-march=x86-64-v2",
    "v3": "-march=x86-64-v3",
    "v4": "-march=x86-64-v4 -mprefer-vector-width=512",
    "v4_bf16": "-march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512",
} if X86 else {"native_isa": ""}
# no -ffast-math: NaN and infinity keep their meaning. OpenMP is compiled in but not linked: see native.py
FLAGS = ("-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math "
         "-Wall -Wno-ignored-attributes -Wno-psabi -Wno-maybe-uninitialized")


def write_ninja(folder, output, isas=ISAS, extra=""):
    """Write build.ninja for the native module into `folder` and return its path."""
    import pybind11

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if not compiler:
        raise FileNotFoundError("no C++ compiler: g++, c++ and clang++ are not on PATH and CXX is not set")
    includes = f"-I{ROOT / 'csrc'} -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    tables = "-D'DIFUSE_TABLES(X)=" + " ".join(f"X({isa})" for isa in isas) + "'"
    lines = [
        f"cxx = {compiler}",
        f"flags = {FLAGS} {includes} {extra}",
        "rule compile\n  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx -shared -s $in -o $out",
    ]
    objects = []
    for isa, flags in isas.items():
        for source in sorted((ROOT / "csrc").glob("*/*_cpu.cpp")):
            objects.append(f"{source.stem}.{isa}.o")
            lines.append(f"build {objects[-1]}: compile {source}\n  isa = {flags} -DDIFUSE_ISA={isa}")
    objects.append("bindings.o")
    lines.append(f"build bindings.o: compile {ROOT / 'csrc' / 'bindings.cpp'}\n  isa = {tables}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    return path


class BuildNative(build_ext):
    """Runs ninja; a missing compiler is reported and survived, a compile error is not."""

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            ninja_file = write_ninja(Path(self.build_temp).resolve() / "native", output)
        except FileNotFoundError as error:
            print(f"difuse: built without the C++ kernels: {error}", file=sys.stderr)
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja") or f"{sys.executable} -m ninja"
        subprocess.run([*ninja.split(), "-C", str(ninja_file.parent)], check=True)

    def copy_extensions_to_source(self):
        if Path(self.build_lib, self.get_ext_filename(self.extensions[0].name)).exists():
            super().copy_extensions_to_source()

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(ext_modules=[Extension("difuse_kernels._native", sources=[])], cmdclass={"build_ext": BuildNative})
