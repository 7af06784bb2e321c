"""`difuse.freeze(model)`: a copy of a model that only computes images, and has everything ready for that.

    frozen = difuse.freeze(model.eval())       # difuse's DiT, or any model that difuse.accelerate knows
    images = difuse.sample(frozen, labels, ...)
    pipe.transformer = difuse.freeze(transformer)
    frozen = difuse.freeze(model, "int8", example_inputs=[(x, t, y), ...])

The copy runs our kernels as `accelerate` would have it. On a CPU its products are ours too (`packed_linear`), on
weights that were packed once, and a block of difuse's, facebookresearch's or diffusers' DiT is one call (`dit_block`).
In the lower precisions the products of the blocks are computed in bfloat16 or with 8-bit integers, the modulations in
bfloat16 where the CPU multiplies it; the residual stream, norms, softmax, every sum, and what comes before the first
block and after the last stay in float32. On a GPU the forward is a CUDA graph (recorded.py).
"""
import copy
import warnings
import weakref
from collections import Counter

import torch
from torch import nn

from difuse.inference.frozen import Frozen
from difuse.inference.fused_block import fuse_blocks
from difuse.inference.hoist import make_hoistable
from difuse.inference.packed import PackedProduct, multiplies_bfloat16
from difuse.inference.packed_model import Packed, keep_freed_memory
from difuse.inference.recorded import Recorded
from difuse.inference.smoothing import largest_inputs, smoothing
from difuse.integrations import facebook_dit
from difuse.integrations.accelerate import accelerate
from difuse.integrations.registry import adapter_of
from difuse.models import DiT
from difuse.models.layers import Attention

NO_BFLOAT16 = ("difuse.freeze: this CPU has no bfloat16 products. Each widens its weights to float32 first: the frozen "
               "model needs half the memory and is no faster than in float32; 'int8' is")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PRECISIONS = "fp32", "bf16", "int8"  # of the products in blocks
_GELUS = {  # class -> names of a product and of the GELU that is all that reads it
    "difuse.models.layers.Mlp": ("fc1", "act"),
    "timm.layers.mlp.Mlp": ("fc1", "act"),
    "diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock": ("proj_mlp", "act_mlp"),
}
_MLPS = {  # class -> its two products, and the modules between them that hand on what they are given, without a GELU
    "difuse.models.layers.Mlp": ("fc1", ("act",), "fc2"),
    "timm.layers.mlp.Mlp": ("fc1", ("act", "drop1", "norm"), "fc2"),
    "diffusers.models.attention.FeedForward": ("net.0", ("net.1",), "net.2"),
}


@torch.inference_mode(False)
@torch.no_grad()
def freeze(model, precision=None, example_inputs=None):
    """A `Frozen` copy of `model`, called like it, for inference. The model stays as it is.

    model: difuse's DiT, or a model with blocks that `difuse.accelerate` knows, in eval mode; an accelerated one keeps
    its backend. On a CPU it is in float32, and the copy's weights are as of now; `refresh()` reads them again.
    precision: of the products in blocks, "fp32" (default), "bf16" or "int8". example_inputs: with "int8" a few real
    calls of the model, each a tuple of arguments or a dict of keyword arguments, whose outlying channels are smoothed
    (SmoothQuant) in every product that they reach; without them nothing is. On a GPU the model stays in its own dtype
    and the copy reads its weights where they lie; every call is recorded once per shape and replayed. On a CPU glibc is
    led to keep up to 64 MB of freed memory in this process, as it does after any block of 32 MB was freed.

    Warns where the CPU has no bfloat16 products. Raises TypeError for what is no module; ValueError for a model in
    train mode, not on one device, on a CPU not in float32, with hooks, LoRA layers or parametrizations on it, without a
    block that accelerate knows, for another precision, or any on a GPU, or for example inputs that the model cannot
    take; RuntimeError where torch was built without oneDNN.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: got {type(model).__name__}; expected a module, e.g. pipe.transformer")
    if isinstance(model, Frozen):
        raise ValueError("freeze: the model is frozen already")
    if precision not in (None, *_PRECISIONS):
        raise ValueError(f"freeze: precision is {precision!r}; expected one of {', '.join(map(repr, _PRECISIONS))}")
    if example_inputs is not None and precision != "int8":
        raise ValueError(f"freeze: example_inputs are what 'int8' is smoothed by; precision is {precision!r}")
    if model.training:
        raise ValueError("freeze: the model is in train mode; call model.eval() first")
    _check(model)
    if next(model.parameters()).is_cuda:
        if precision is not None:
            raise ValueError(f"freeze: precision is {precision!r}, and the model is on a GPU, where it stays in its "
                             "own dtype; convert it first, e.g. with model.to(torch.bfloat16)")
        return record(model)
    return _pack(model, precision or "fp32", example_inputs)


def record(model):
    """The `Recorded` of a checked model: its copy has the same weights, not others like them."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return Recorded(_accelerated(copy.deepcopy(model, shared)), weakref.ref(model))


def _pack(model, precision, example_inputs):
    """The `Packed` of a checked model."""
    if precision == "bf16" and not multiplies_bfloat16():
        warnings.warn(NO_BFLOAT16, stacklevel=5)
    linears = _packable(model)
    # memo: the copy refers to these weights until they are packed, and never holds a second plain copy of them
    frozen = _accelerated(copy.deepcopy(model, {id(linear.weight): linear.weight for linear in linears.values()}))
    smooth = _smoothing(frozen, linears, example_inputs) if example_inputs is not None else {}
    products = {}  # one for a layer at several places
    for path, linear in linears.items():
        if id(linear) not in products:
            products[id(linear)] = PackedProduct(linear, _precision_of(path, precision), smooth.get(path))
    packed = {path: products[id(linear)] for path, linear in linears.items()}
    for path, product in packed.items():
        frozen.set_submodule(path, product)
    _fuse_gelus(frozen)
    _hand_on(frozen, precision)
    workspaces = fuse_blocks(frozen)
    keep_freed_memory()
    modulations = make_hoistable(frozen)
    return Packed(frozen.requires_grad_(False), weakref.ref(model), packed, modulations, workspaces)


def _accelerated(model):
    if not isinstance(model, DiT) and not any(adapter_of(vars(module).get("forward")) for module in model.modules()):
        accelerate(model)
    return model


def _check(model):
    """Raise ValueError for a model that cannot be frozen where it is, or that somebody has built something onto."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(f"freeze: the model is on {', '.join(sorted(map(str, devices))) or 'no device'}; expected the "
                         "CPU or one GPU")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if next(iter(devices)).type == "cpu" and dtypes != {torch.float32}:
        raise ValueError(f"freeze: the model's weights are {', '.join(sorted(map(str, dtypes)))}; expected "
                         "torch.float32 alone. Convert it with model.float()")
    for path, module in model.named_modules():
        path = path or "the model"
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(f"freeze: {path} is a {type(module).__name__} of peft; merge it into its layer first, "
                             "e.g. with model.fuse_lora() or merge_and_unload(), and unload it")
        if "parametrizations" in module._modules:
            raise ValueError(f"freeze: {path} has parametrized weights; remove them first, with "
                             "torch.nn.utils.parametrize.remove_parametrizations")
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise ValueError(f"freeze: {path} has hooks, which a frozen model would not call; remove them first")
        forward = vars(module).get("forward")
        if forward is not None and adapter_of(forward) is None:
            raise ValueError(f"freeze: the forward of {path} was replaced by somebody; take that back first")


def _packable(model):
    """{path: nn.Linear} of the products that own their weight. Not of embeddings: adapters compare their weights."""
    linears = {path: module for path, module in model.named_modules(remove_duplicate=False)
               if type(module) is nn.Linear and not any("emb" in part for part in path.split("."))}
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    return {path: linear for path, linear in linears.items() if owners[id(linear.weight)] == 1}


def _in_a_block(path):
    """Whether this is a product of one of many blocks, not of the model's ends and not of a modulation."""
    return any(part.isdigit() for part in path.split(".")) and not _is_modulation(path) and "caption" not in path


def _is_modulation(path):
    return any(part.startswith(("norm", "adaLN")) or part.endswith("_mod") for part in path.split("."))


def _precision_of(path, precision):
    """A modulation's few rows take as long as its weight takes to be read: half as long in bfloat16, close enough."""
    if _in_a_block(path):
        return precision
    return "bf16" if _is_modulation(path) and precision != "fp32" else "fp32"


def _smoothing(model, linears, calls):
    """{path: 1 / s} of the products that will be computed with integers, from a few calls of the copy."""
    linears = {path: linear for path, linear in linears.items() if _in_a_block(path)}
    largest = largest_inputs(model, {path: model.get_submodule(path) for path in linears}, calls)
    return {path: smoothing(most, linears[path].weight) for path, most in largest.items()}


def _parents(model):
    """{id(module): how many modules have it as a child}."""
    return Counter(id(child) for module in model.modules() for child in module._modules.values())


def _mlps_of(model, precision):
    """(first, second) product of every MLP between whose two, both in `precision`, nothing is left to need floats."""
    parents = _parents(model)
    for module in model.modules():
        name = f"{type(module).__module__}.{type(module).__name__}"
        if name not in _MLPS:
            continue
        first, between, second = _MLPS[name]
        parts = dict(module.named_modules(remove_duplicate=False))
        products = [parts.get(path) for path in (first, second)]
        between = [path for path in between if path in parts]  # older releases of timm have fewer
        if (all(_is_in(product, precision) for product in products) and parents[id(products[0])] == 1
                and all(isinstance(parts[path], (nn.Identity, nn.Dropout)) for path in between)):
            for path in between:
                module.set_submodule(path, nn.Identity())
            yield products


def _is_in(module, precision):
    return isinstance(module, PackedProduct) and module.precision == precision


def _hand_on(model, precision):
    """Let products round what the next one would: through an MLP, and to bfloat16 before attention."""
    if precision == "fp32":
        return
    for first, second in _mlps_of(model, precision):
        if precision == "int8":
            first.read_by(second)
        else:
            first.out_dtype = torch.bfloat16
    if precision == "int8" and not multiplies_bfloat16():
        return
    parents = _parents(model)
    for module in model.modules():
        adapter = adapter_of(vars(module).get("forward"))
        known = type(module) is Attention or (adapter is not None and adapter.forward is facebook_dit.attention)
        if known and _is_in(module.qkv, precision) and _is_in(module.proj, precision) and parents[id(module.qkv)] == 1:
            module.qkv.out_dtype = torch.bfloat16


def _fuse_gelus(model):
    """Let the product before a GELU compute it too, where nothing else reads that product."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        name = f"{type(module).__module__}.{type(module).__name__}"
        if name == "diffusers.models.activations.GELU" and isinstance(module.proj, PackedProduct):
            module.proj.gelu = module.approximate
            model.set_submodule(path, module.proj)
        elif name in _GELUS:
            product, act = _GELUS[name]
            gelu = getattr(module, act)
            if isinstance(getattr(module, product), PackedProduct) and isinstance(gelu, nn.GELU):
                getattr(module, product).gelu = gelu.approximate
                setattr(module, act, nn.Identity())
