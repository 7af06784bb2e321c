"""Builds and loads CUDA sources as emulated modules: csrc's in place of the real one, and those of tests."""
import ctypes
import fcntl
import importlib.util
import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent.parent
SANITIZED = os.environ.get("DIFUSE_SANITIZE") == "1"  # `make sanitize`
FOLDER = "sanitized" if SANITIZED else "emulated"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def setup():
    """The names that setup.py defines."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def missing():
    """Why nothing can be built here, or None."""
    for package in ("pybind11", "ninja"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; the extra [test] brings it"
    try:
        setup()["cxx"]()
    except FileNotFoundError as error:
        return str(error)


def build(name, folder, sources=None):
    """The path of the module `name`, built in `folder` from csrc or from `sources`, as far as it is not up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    with open(folder / "lock", "w") as lock:  # of the workers of one pytest, the first builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        setup()["write_emulated_ninja"](folder, module, SANITIZERS if SANITIZED else "", sources)
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], env=environment, capture_output=True,
                              text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated {name} could not be built:\n{done.stdout}{done.stderr}")
    return module


def sanitizer_environment():
    """The variables with which Python loads a sanitized module: the sanitizer and its libstdc++ must come first."""
    libraries = [subprocess.run([setup()["cxx"](), f"-print-file-name={name}"], capture_output=True, text=True,
                                check=True).stdout.strip() for name in ("libasan.so", "libstdc++.so.6")]
    return {"DIFUSE_SANITIZE": "1", "LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1"}


def load(full_name):
    """The module built from csrc, in sys.modules; `reverse(on)` turns its order of blocks and threads around.

    With DIFUSE_EMULATED_REVERSE=1 it is turned around from the start.
    """
    path = build(full_name.rpartition(".")[2], ROOT / "build" / FOLDER)
    spec = importlib.util.spec_from_file_location(full_name, path)
    sys.modules[full_name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.reverse = ctypes.CDLL(str(path)).emulated_reverse
    module.reverse(os.environ.get("DIFUSE_EMULATED_REVERSE") == "1")
    return module


class Library:
    """A library of sources that bind nothing to Python: `call` passes tensors as addresses."""

    def __init__(self, path):
        self.loaded = ctypes.CDLL(str(path))

    def __getattr__(self, name):
        function = getattr(self.loaded, name)
        function.restype = ctypes.c_char_p  # an error's text, or None

        def call(*arguments):
            error = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))
            if error:
                raise RuntimeError(error.decode())

        return call

    def reverse(self, on):
        self.loaded.emulated_reverse(on)


if __name__ == "__main__":  # for `env $(python -m tests.emulation.build)`
    print(*(f"{name}={value}" for name, value in sanitizer_environment().items()))
