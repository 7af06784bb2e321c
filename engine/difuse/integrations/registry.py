"""Which classes have a fused forward, and in which file. Nothing of a third party is imported here."""
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from difuse_kernels.dispatch import OPS

_DIFFUSERS = "diffusers.models."
_TRANSFORMERS = _DIFFUSERS + "transformers."
KNOWN = {  # full name of a class -> the file of this package that registers its adapter
    "torch.nn.modules.linear.Linear": "products",
    "torch.nn.modules.activation.GELU": "activations",
    "torch.nn.modules.conv.Conv2d": "products",
    "torch.nn.modules.conv.Conv3d": "products",
    "torch.nn.modules.normalization.GroupNorm": "diffusers_unet",
    _DIFFUSERS + "activations.GEGLU": "diffusers_parts",
    _DIFFUSERS + "activations.GELU": "activations",
    _DIFFUSERS + "attention.BasicTransformerBlock": "diffusers_basic_block",
    _DIFFUSERS + "attention_processor.Attention": "diffusers_attention",
    _DIFFUSERS + "normalization.AdaLayerNormZero": "diffusers_parts",
    _DIFFUSERS + "normalization.AdaLayerNormZeroSingle": "diffusers_parts",
    _DIFFUSERS + "normalization.AdaLayerNormContinuous": "diffusers_parts",
    _DIFFUSERS + "resnet.ResnetBlock2D": "diffusers_unet",
    _TRANSFORMERS + "dit_transformer_2d.DiTTransformer2DModel": "diffusers_dit",
    _TRANSFORMERS + "transformer_flux.FluxAttention": "diffusers_flux",
    _TRANSFORMERS + "transformer_flux.FluxTransformerBlock": "diffusers_flux",
    _TRANSFORMERS + "transformer_flux.FluxSingleTransformerBlock": "diffusers_flux",
    _TRANSFORMERS + "transformer_flux2.Flux2SwiGLU": "diffusers_flux2",
    _TRANSFORMERS + "transformer_flux2.Flux2Attention": "diffusers_flux2",
    _TRANSFORMERS + "transformer_flux2.Flux2ParallelSelfAttention": "diffusers_flux2",
    _TRANSFORMERS + "transformer_flux2.Flux2TransformerBlock": "diffusers_flux2",
    _TRANSFORMERS + "transformer_flux2.Flux2SingleTransformerBlock": "diffusers_flux2",
    _TRANSFORMERS + "transformer_qwenimage.QwenImageTransformerBlock": "diffusers_qwenimage",
    _TRANSFORMERS + "transformer_sd3.SD3SingleTransformerBlock": "diffusers_sd3",
    _DIFFUSERS + "attention.JointTransformerBlock": "diffusers_sd3",
    _DIFFUSERS + "normalization.SD35AdaLayerNormZeroX": "diffusers_sd3",
    _TRANSFORMERS + "transformer_wan.WanAttention": "diffusers_wan",
    _TRANSFORMERS + "transformer_wan.WanTransformerBlock": "diffusers_wan",
    _TRANSFORMERS + "transformer_ltx.LTXAttention": "diffusers_ltx",
    _TRANSFORMERS + "transformer_ltx.LTXVideoTransformerBlock": "diffusers_ltx",
    _TRANSFORMERS + "transformer_hidream_image.HiDreamAttention": "diffusers_hidream",
    _TRANSFORMERS + "transformer_hidream_image.HiDreamImageTransformerBlock": "diffusers_hidream",
    _TRANSFORMERS + "transformer_hidream_image.HiDreamImageSingleTransformerBlock": "diffusers_hidream",
}
STRUCTURES = {  # an attribute that gives a family away whose classes live in no package -> its file
    "adaLN_modulation": "facebook_dit",
    "qkv": "facebook_dit",
}

_adapters = {}  # full name of a class -> Adapter
_structures = []  # adapters that recognise a module by its parts
_forwards = {}  # forward function -> Adapter


@dataclass(frozen=True)
class Adapter:
    """A class's forward on difuse's ops.

    forward(module, ...) has the parameters of the class's own forward. refuses(module) says why this module must keep
    its own (an option without an equivalent), or None. kind: "block", "part" (of a block) or "layer" (torch's
    own, or as small: it makes no model known and is left out of the report where there is nothing to gain).
    """

    name: str
    forward: Callable
    refuses: Callable
    ops: tuple[str, ...]
    kind: str
    matches: Callable | None = None


def own_class(module):
    """The module's class, looking through the subclass that FSDP2 makes of it."""
    cls = type(module)
    return cls.__bases__[1] if cls.__bases__[0].__name__ == "FSDPModule" else cls


def full_name(cls):
    """A class's module and name, e.g. "diffusers.models.attention.BasicTransformerBlock"."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _nothing(_module):
    return None


def register(target, *, refuses=_nothing, ops=(), kind="block", matches=None):
    """Decorator: the function below it becomes the forward of every `target` module that `accelerate` meets.

    target: a class, or its full name as a string; with `matches(module) -> bool`, which recognises modules by their
    parts, only a name for the report. refuses(module): why a module must keep its own forward, or None.
    ops: names of the ops that the forward calls, whose backend `accelerate` checks. kind: "block", or "part" of one,
    in the report. The function lives at the top level of a module, so that accelerated models can be pickled.
    Raises TypeError for a target that is neither, ValueError for the name of an unknown op.

        @difuse.integrations.register(MyBlock, ops=("norm_modulate",))
        def my_block(self, x, c): ...
    """
    if not isinstance(target, (str, type)):
        raise TypeError(f"register: target is {target!r}; expected a class or its full name")
    if kind not in ("block", "part", "layer"):
        raise ValueError(f"register: kind is {kind!r}; expected 'block', or 'part' of one")
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise ValueError(f"register: ops {unknown} are unknown; expected some of {', '.join(OPS)}")
    name = target if isinstance(target, str) else full_name(target)

    def add(forward):
        adapter = Adapter(name.rpartition(".")[2], forward, refuses, tuple(ops), kind, matches)
        if matches is None:
            _adapters[name] = adapter
        else:
            _structures[:] = [a for a in _structures if a.name != adapter.name] + [adapter]
        _forwards[forward] = adapter
        return forward

    return add


def find(module):
    """The adapter of this module's class or structure, or None. Imports the family's file at its first module."""
    name = full_name(own_class(module))
    if name not in _adapters and name in KNOWN:
        importlib.import_module(f"difuse.integrations.{KNOWN[name]}")
    if name in _adapters:
        return _adapters[name]
    for attribute, file in STRUCTURES.items():
        if hasattr(module, attribute):
            importlib.import_module(f"difuse.integrations.{file}")
    return next((adapter for adapter in _structures if adapter.matches(module)), None)


def adapter_of(forward):
    """The adapter that a module's instance attribute `forward` came from, or None if it is not ours."""
    arguments = getattr(forward, "args", ())  # functools.partial(function, module) or (on_backend, name, function, ..)
    candidates = (getattr(forward, "func", None), *arguments) if not hasattr(forward, "__wrapped__") else ()
    return next((_forwards[f] for f in candidates if callable(f) and f in _forwards), None)


def known_names():
    """Full names of all classes with an adapter."""
    return sorted({*KNOWN, *_adapters})
