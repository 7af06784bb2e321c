"""`difuse doctor`: what this machine and this installation offer, one line each, and what to do about the rest."""
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil

# package -> what it is for here
OPTIONAL = {
    "scikit-learn": "difuse demo: digits and their judge",
    "pillow": "image folders and PNG grids",
    "matplotlib": "the loss curve of difuse demo",
    "diffusers": "accelerating diffusers models",
}
INSTALL = {"diffusers": "pip install 'difuse[diffusers]'"}  # the others come with difuse[demo]
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16")
OPENMP = re.compile(r"/(lib(?:gomp|omp|iomp5)[^/\s]*)$", re.MULTILINE)


def examine():
    """Yield (state, text) per finding: state "ok", "no" (difuse works without it) or "broken"."""
    yield "ok", f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    try:
        import torch
    except ImportError as error:
        yield "broken", f"torch cannot be imported ({error}): pip install torch"
        return
    yield "ok", f"torch {torch.__version__}"
    try:
        from difuse_kernels import native
    except ImportError as error:
        yield "broken", f"difuse_kernels cannot be imported ({error}): reinstall difuse"
        return
    if native.missing():
        yield "no", f"native module: {native.missing()}; until then every op runs its slow reference"
    else:
        built = ", ".join(native.ext.isas())
        yield "ok", f"native module: runs {native.ext.isa()} (built in: {built}; DIFUSE_ISA=<name> forces one)"
    yield _threads(torch)
    yield from _openmp()
    yield from _cpu_flags()
    yield _cuda(torch)
    yield _cuda_kernels()
    yield _triton()
    yield _compiler()
    for package, purpose in OPTIONAL.items():
        yield _package(package, purpose, INSTALL.get(package, "pip install 'difuse[demo]'"))
    yield _self_check(torch)


def main():
    """Print the findings; return 0, or 1 where difuse itself cannot work."""
    findings = list(examine())
    for state, text in findings:
        print(f"{state:6}  {text}")
    return int(any(state == "broken" for state, _ in findings))


def _threads(torch):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    text = f"{threads} threads on {cores} usable cores"
    if threads > cores:
        return "no", f"{text}: threads fight for cores; set OMP_NUM_THREADS={cores}"
    return "ok", text


def _openmp():
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists():
        return
    loaded = sorted(set(OPENMP.findall(maps.read_text())))
    if len(loaded) > 1:
        yield "no", (f"OpenMP: {len(loaded)} runtimes in one process ({', '.join(loaded)}), each with threads of its "
                     "own; find which package brings the second one")
    else:
        yield "ok", f"OpenMP: {loaded[0] if loaded else 'none loaded'}"


def _cpu_flags():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return
    text = cpuinfo.read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    if flags:
        have = set(flags[1].split())
        listed = " ".join(f if f in have else f"({f}: no)" for f in CPU_FLAGS)
        yield "ok", f"CPU: {model[1] if model else 'unknown model'}; {listed}"


def _cuda(torch):
    if torch.version.cuda is None:
        return "no", "CUDA: this torch is built without it; for a GPU install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "no", f"CUDA: torch is built for {torch.version.cuda}, but no usable GPU or driver; see nvidia-smi"
    return "ok", f"CUDA: {torch.version.cuda}, {torch.cuda.get_device_name()}"


def _cuda_kernels():
    from difuse_kernels import native_cuda

    reason = native_cuda.missing()
    built = "" if native_cuda.ext is None else f" (built in: {', '.join(native_cuda.ext.architectures())})"
    if reason:
        return "no", f"CUDA C++ kernels{built}: {reason}"
    return "ok", f"CUDA C++ kernels{built}{': emulated, slowly, on CPU tensors' if native_cuda.ext.emulated else ''}"


def _triton():
    from difuse_kernels import triton_launch

    reason = triton_launch.missing()
    if reason:
        return "no", f"Triton kernels for GPUs: {reason}"
    import triton
    how = "in the interpreter, slowly: TRITON_INTERPRET is set" if triton_launch.INTERPRETED else "on the GPU"
    return "ok", f"Triton kernels: triton {triton.__version__}, {how}"


def _compiler():
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(name.split()[0]):
            return "ok", f"C++ compiler: {name}"
    return "no", "C++ compiler: none found; a reinstall from source would leave the native module out. Install g++"


def _package(name, purpose, advice):
    try:
        return "ok", f"{name} {importlib.metadata.version(name)} ({purpose})"
    except importlib.metadata.PackageNotFoundError:
        return "no", f"{name} is not installed ({purpose}): {advice}"


def _self_check(torch):
    """One op, on whatever backend "auto" takes, against its reference."""
    from difuse_kernels import norm_modulate

    generator = torch.Generator().manual_seed(0)
    x, scale, shift = (torch.randn(shape, generator=generator) for shape in ((2, 7, 33), (2, 33), (2, 33)))
    error = (norm_modulate(x, scale, shift) - norm_modulate(x, scale, shift, backend="reference")).abs().max().item()
    if error > 1e-5:  # float32 rounding is near 1e-6 here
        return "broken", f"self-check: norm_modulate is off by {error:.1e}; report this with the lines above"
    return "ok", f"self-check: norm_modulate agrees with its reference within {error:.0e}"
