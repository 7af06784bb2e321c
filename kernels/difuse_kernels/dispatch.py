"""Which backend runs an op, and why not the others. This file knows no op.

Every op folder holds one module per backend. A kernel module offers `unsupported(op, inputs) -> str | None` (a
sentence without sizes in it, so that reasons can be counted), `<op>_forward` and `<op>_backward`; the reference
module offers `<op>` itself, in differentiable PyTorch.
"""
import contextlib
import importlib
import os
import threading
import warnings
from collections import Counter

import torch
from torch.autograd import forward_ad

from difuse_kernels import library, native, native_cuda, triton_launch
from difuse_kernels.checks import check_same_device

BACKENDS = ("reference", "cpu", "triton", "cuda")
# "auto" takes the first of these that does not refuse; a device not named here has the reference only
ORDER = {"cpu": ("cpu", "reference"),
         "cuda": ("triton", "reference") if torch.version.hip else ("cuda", "triton", "reference")}
# what keeps a backend from running anything at all here: a reason, or None
MISSING = {"reference": lambda: None, "cpu": native.missing, "cuda": native_cuda.missing,
           "triton": triton_launch.missing}
MACHINES = {"cpu": native, "cuda": native_cuda}  # the C++ backends: one launcher, `<op>_native.py`, serves both

OPS = {}  # name -> Op, in order of definition
_forced = "auto"  # of the process, not of a thread: backward passes run, and recompute, on threads of their own
this_thread = threading.local()  # .backend wins in it: that of one model's forward, see difuse.accelerate
_warned = set()


class Implementation:
    """One backend's functions for one op. `backward` is None for the reference, which autograd differentiates."""

    def __init__(self, name, forward, backward, unsupported):
        self.name, self.forward, self.backward, self.unsupported = name, forward, backward, unsupported


class Op:
    """A named op with a module per backend, e.g. Op("attention", "difuse_kernels.attention.attention", "cpu")."""

    def __init__(self, name, stem, *backends):
        self.name, self.stem, self.backends = name, stem, ("reference", *backends)
        self.compiled = {}  # backend -> what torch.compile sees: see library.py
        self.chosen = Counter()  # (backend, ((refused backend, reason), ...)) -> calls
        self._implementations = {}
        self.implementation("reference")  # now: torch.compile cannot trace an import
        OPS[name] = self

    def implementation(self, backend):
        """The backend's functions, imported on first use. The backend must be installed: see `missing`."""
        if backend not in self._implementations:
            module = importlib.import_module(f"{self.stem}_{'native' if backend in MACHINES else backend}")
            if backend in MACHINES:
                module = module.Launchers(MACHINES[backend])
            functions = ((getattr(module, self.name), None, lambda _op, _inputs: None) if backend == "reference" else
                         (getattr(module, f"{self.name}_forward"), getattr(module, f"{self.name}_backward"),
                          module.unsupported))
            self._implementations[backend] = Implementation(backend, *functions)
        return self._implementations[backend]

    def missing(self, backend):
        """Why `backend` can run nothing of this op on this machine, or None."""
        return MISSING[backend]() if backend in self.backends else "not written for this op yet"

    def refusal(self, backend, inputs):
        """Why `backend` does not take these inputs, or None."""
        return self.missing(backend) or self.implementation(backend).unsupported(self.name, inputs)

    def select(self, requested, inputs):
        """The implementation to run. `inputs` is a tuple of tensors (or None) whose first entry is a tensor."""
        if requested == "auto":
            requested = forced_backend()
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return self._under_transform(requested)
        if requested != "auto":
            order = (requested,)
        else:
            order = ORDER["cpu"] if inputs[0].is_cpu else ORDER.get(inputs[0].device.type, ("reference",))
        if torch.compiler.is_compiling():
            implementation = library.select(self, order, inputs)
            if implementation is None:
                raise self._unsupported(requested, inputs)
            return implementation
        refusals = ()
        for backend in order:
            found = self._implementations.get(backend)  # there already: installed, so only the inputs are in question
            reason = found.unsupported(self.name, inputs) if found else self.refusal(backend, inputs)
            if reason is None:
                self.chosen[backend, refusals] += 1
                if refusals:
                    self._announce(backend, refusals)
                return found or self.implementation(backend)
            if not refusals:
                check_same_device(self.name, inputs)  # a better reason to stop than any backend's
            refusals += ((backend, reason),)
        raise self._unsupported(requested, inputs)

    def _under_transform(self, requested):
        """torch.func's grad, vmap and jvp, and forward-mode derivatives, see PyTorch operations, not into kernels."""
        if requested not in ("auto", "reference"):
            raise RuntimeError(f"{self.name}: backend '{requested}' cannot run under torch.func transforms or forward "
                               "derivatives; use backend='auto', which then takes the reference")
        if not torch.compiler.is_compiling():
            self.chosen["reference", (("kernels", "a torch.func transform or forward-mode level is active"),)] += 1
        return self.implementation("reference")

    def _announce(self, backend, refusals):
        for refused, reason in refusals:
            if refused not in self.backends or (backend != "reference" and not self.missing(refused)):
                continue  # another kernel took what was not written for this one, e.g. Triton the tables of adaln
            text = f"difuse: {self.name} runs on '{backend}', not on '{refused}': {reason}"
            if os.environ.get("DIFUSE_FAIL_ON_FALLBACK") == "1":
                raise RuntimeError(text)
            key = (None if self.missing(refused) else self.name, refused)  # a missing backend warns once for all ops
            if key not in _warned:
                _warned.add(key)
                warnings.warn(text, stacklevel=4)

    def _unsupported(self, requested, inputs):
        if requested not in BACKENDS:
            return ValueError(f"{self.name}: backend {requested!r} is unknown; expected 'auto' or one of {BACKENDS}")
        got = ", ".join("None" if t is None else f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in inputs)
        reasons = "; ".join(f"{name}: {self.refusal(name, inputs) or 'ready'}" for name in BACKENDS)
        return RuntimeError(f"{self.name}: backend '{requested}' cannot run inputs [{got}]. Per backend: {reasons}. "
                            "Choose one that is ready, or backend='auto'.")


def forced_backend():
    """The backend of this model's forward or of the innermost `use_backend` block, or "auto"."""
    return getattr(this_thread, "backend", None) or _forced


@contextlib.contextmanager
def use_backend(name):
    """Inside the block every op called with backend="auto" runs on `name`, or raises if it cannot.

    `use_backend("reference")` turns a model into its slow self. Inner blocks override outer ones, in the whole process.
    """
    global _forced
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"use_backend: {name!r} is unknown; expected 'auto' or one of {BACKENDS}")
    outer, _forced = _forced, name
    try:
        yield
    finally:
        _forced = outer
