"""accelerate, restore, explain: known blocks of somebody else's model run on difuse's ops, on this instance only.

A replaced forward is an instance attribute, functools.partial(function, module): the class is untouched, and deepcopy
and pickle carry it along. Parameters stay where and what they are; every forward reads them anew through the module's
own children, which are called as modules: LoRA, hooks and sharding on them keep working.
"""
import functools
import sys
import warnings
from collections import Counter, defaultdict

import torch
from torch import nn

import difuse_kernels
from difuse.integrations.conditioning import end_caches
from difuse.integrations.registry import adapter_of, find, known_names
from difuse_kernels.dispatch import OPS, this_thread

WRITTEN_FOR = {"diffusers": "0.42"}


class Report:
    """What `accelerate` did: `accelerated` {path: (class, None)}, `left_alone` {path: (class, why)}; str() shows it."""

    def __init__(self, model, accelerated, left_alone, kind):
        self.model, self.accelerated, self.left_alone, self._kind = model, accelerated, left_alone, kind

    @property
    def blocks(self):
        """(number of blocks accelerated, number of blocks known)."""
        done = sum(self._kind[path] == "block" for path in self.accelerated)
        return done, done + sum(self._kind[path] == "block" for path in self.left_alone)

    def kind(self, path):
        """What the module at `path` is: "block", "part" (of one) or "layer" (torch's own, or as small)."""
        return self._kind[path]

    def __str__(self):
        counts, known = Counter(), Counter()
        for found, done in ((self.accelerated, 1), (self.left_alone, 0)):
            for path, (name, _) in found.items():
                counts[self._kind[path], name] += done
                known[self._kind[path], name] += 1
        lines = [f"difuse: {self.model}, {self.blocks[0]} of {self.blocks[1]} blocks accelerated"]
        lines += [f"  {counts[key]:>3} of {known[key]:>3} {key[1]} ({key[0]})" for key in sorted(known)]
        reasons = defaultdict(list)
        for path, (name, why) in self.left_alone.items():
            reasons[name, why].append(path)
        for (name, why), paths in reasons.items():
            others = f" and {len(paths) - 1} others" if len(paths) > 1 else ""
            lines.append(f"  left alone: {paths[0] or 'the model'}{others} ({name}): {why}")
        return "\n".join(lines)


def on_backend(backend, forward, module, *args, **kwargs):
    """The forward with every op on `backend`, in this thread: other models may run on other backends in others."""
    outer, this_thread.backend = getattr(this_thread, "backend", None), backend
    try:
        return forward(module, *args, **kwargs)
    finally:
        this_thread.backend = outer


def accelerate(model, *, backend="auto", strict=False):
    """Replace the forward of every block of `model` that difuse knows, on this instance. Returns a `Report`.

    model: an nn.Module, e.g. pipe.transformer, pipe.unet, pipe.vae or a facebookresearch DiT. Calling it twice equals
    calling it once; parameters, state_dict, classes and other instances are untouched. Do it before torch.compile.
    backend: "auto", or the one backend that every op must run on ("reference", "cpu", "triton", "cuda").
    strict: raise instead of leaving a known module alone.

    Raises TypeError if model is no module, ValueError if nothing in it is known or, with strict, if a module is left
    alone, RuntimeError if `backend` cannot run here on the model's device. When it raises, nothing was changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: got {type(model).__name__}; expected a module. Of a pipeline pass the part that "
                        "computes: pipe.transformer, pipe.unet, pipe.vae")
    plan, left_alone, kind = {}, {}, {}
    for path, module in model.named_modules():
        adapter = find(module)
        if adapter is None:
            continue
        why = _why_not(module, adapter)
        if why is not None and adapter.kind == "layer":  # it is fused with nothing: little is lost
            continue
        kind[path] = adapter.kind
        if why is None:
            plan[path] = module, adapter
        else:
            left_alone[path] = adapter.name, why
    report = Report(type(model).__name__, {path: (a.name, None) for path, (_, a) in plan.items()}, left_alone, kind)
    if not {"block", "part"} & set(kind.values()):
        raise ValueError(f"accelerate: nothing in {type(model).__name__} is known; it has {_classes(model)}. Known are "
                         f"{', '.join(name.rpartition('.')[2] for name in known_names())}, and facebookresearch/DiT's "
                         "blocks by their parts. Add your own block with difuse.integrations.register")
    if strict and left_alone:
        raise ValueError(f"accelerate: strict=True and {len(left_alone)} modules would be left alone.\n{report}")
    if backend != "auto":
        _check_backend(model, backend, {op for _, adapter in plan.values() for op in adapter.ops})
    _warn_of_versions(model)
    for path in left_alone:  # what an earlier call replaced, and may no longer
        module = model.get_submodule(path)
        if adapter_of(vars(module).get("forward")):
            del module.forward
    for module, adapter in plan.values():
        if _under_a_hook(module):
            continue
        module.forward = (functools.partial(adapter.forward, module) if backend == "auto" else
                          functools.partial(on_backend, backend, adapter.forward, module))
    return report


def restore(model):
    """Give every accelerated module of `model` its own forward back, end its conditioning caches. Returns how many.

    Raises RuntimeError, and changes nothing, where another wrapper lies over ours: undo that one first.
    """
    ours = []
    for path, module in model.named_modules():
        if _under_a_hook(module):
            raise RuntimeError(f"restore: the forward of {path or 'the model'} was wrapped after accelerate (by a hook "
                               "of the accelerate package, of diffusers' caches or offloading); take that off first")
        if adapter_of(vars(module).get("forward")):
            ours.append(module)
    end_caches(model)
    for module in ours:
        del module.forward
    return len(ours)


def explain(model=None):
    """What runs where, as text: of `model` block by block, with the reasons, then of every op that has run so far."""
    ran = difuse_kernels.explain()
    if model is None:
        return ran
    lines = [type(model).__name__]
    for path, module in model.named_modules():
        adapter = find(module)
        if adapter is None or adapter.kind == "layer":
            continue
        forward = vars(module).get("forward")
        if adapter_of(forward) is None and _under_a_hook(module):
            state = f"{', '.join(adapter.ops)}, under somebody's hook"
        elif adapter_of(forward) is None:
            state = f"its own forward: {_why_not(module, adapter) or 'not accelerated'}"
        else:
            why, forced = adapter.refuses(module), [a for a in forward.args if isinstance(a, str)]
            state = f"by now refused: {why}; call difuse.accelerate again" if why else ", ".join(adapter.ops) + "".join(
                f" on {backend}" for backend in forced)
        lines.append(f"  {path or '(the model)':40} {adapter.name:28} {state}")
    return "\n".join([*lines, "ops so far:", *(f"  {line}" for line in ran.splitlines())])


def _why_not(module, adapter):
    """Why this module keeps its own forward, or None."""
    forward = vars(module).get("forward")
    if forward is not None and adapter_of(forward) is None and not _under_a_hook(module):
        return ("its forward was replaced by something else already (hooks of the accelerate package and of diffusers' "
                "caches and offloading do so); call difuse.accelerate first")
    return _unknown_weights(module) or adapter.refuses(module)


def _under_a_hook(module):
    """Whether somebody's wrapper, made with functools.update_wrapper, lies over a forward of ours."""
    forward = vars(module).get("forward")
    while (forward := getattr(forward, "__wrapped__", None)) is not None:
        if adapter_of(forward):
            return True
    return False


def _unknown_weights(module):
    for path, child in module.named_modules():
        path, cls = path or "it", type(child)
        if "Linear" in cls.__name__ and cls not in (nn.Linear, nn.Identity) and cls.__module__.split(".")[0] != "peft":
            return f"{path} is a {cls.__name__}, whose arithmetic difuse does not know"
        for name, weight in child.named_parameters(recurse=False):
            kind = type(weight.data).__name__
            if kind not in ("Tensor", "DTensor") or not weight.is_floating_point():
                return f"{path}.{name} is a {kind} of {weight.dtype}, whose arithmetic difuse does not know"
    return None


def _probe(op, dtype, device):
    """Inputs of the smallest call of `op`, as its backends see them."""
    def make(*shape):
        return torch.empty(shape, dtype=dtype, device=device)

    heads = make(1, 1, 1, 8)
    return {"attention": (heads, heads, heads, None, None), "qk_norm_rope": (heads, heads),
            "qk_norm_rope_joint": (heads, heads, heads), "attention_packed": (make(1, 1, 3, 1, 8), None, None),
            "group_norm_act": (make(1, 8, 1, 1), None, None, None)}.get(op, (make(1, 1, 8),))


def _check_backend(model, backend, ops):
    if backend not in difuse_kernels.dispatch.BACKENDS:
        raise ValueError(f"accelerate: backend {backend!r} is unknown; expected 'auto' or one of "
                         f"{difuse_kernels.dispatch.BACKENDS}")
    for dtype, device in {(weight.dtype, weight.device) for weight in model.parameters()}:
        refusals = {op: OPS[op].refusal(backend, _probe(op, dtype, device)) for op in sorted(ops)}
        refusals = [f"{op}: {why}" for op, why in refusals.items() if why]
        if refusals:
            raise RuntimeError(f"accelerate: backend '{backend}' cannot run a model of {dtype} on {device}. "
                               f"{'; '.join(refusals)}. Leave backend='auto', or move the model first")


def _warn_of_versions(model):
    for package, version in WRITTEN_FOR.items():
        there = getattr(sys.modules.get(package), "__version__", version)
        used = any(type(module).__module__.startswith(f"{package}.") for module in model.modules())
        if used and not there.startswith(f"{version}."):
            warnings.warn(f"difuse: the adapters were written for {package} {version}, this is {there}; compare a few "
                          "outputs with and without difuse.accelerate", stacklevel=3)


def _classes(model):
    names = Counter(type(module).__name__ for module in model.modules())
    return ", ".join(name for name, _ in names.most_common(6))
