"""Frozen DiT blocks in one call each: `difuse_kernels.dit_block`.

For blocks of difuse's DiT and of facebookresearch's DiT and SiT, whose formulas are the same. With somebody's hooks on
its parts a block runs them one by one.
"""
import functools
import threading

from torch import nn

from difuse.inference.packed import PackedProduct
from difuse.integrations import facebook_dit
from difuse.integrations.parts import rows, watched
from difuse.integrations.registry import adapter_of
from difuse.models import DiT
from difuse.models.layers import Attention, DiTBlock, Mlp
from difuse_kernels import Workspace, dit_block

_EPS = 1e-6  # of the norms of difuse's DiT
_TIMM = "timm.layers.mlp.Mlp"


class Workspaces(threading.local):
    """A Workspace for each thread that calls a frozen model."""

    def __init__(self):
        self.here = Workspace()


def fuse_blocks(model):
    """Give every block of a frozen model's own copy that is known and whole the forward below; its Workspaces."""
    workspaces = Workspaces()
    overwrite = type(model).forward is DiT.forward  # which lets go of a block's x as soon as the next one has it
    for block in model.modules():
        own = type(block) is DiTBlock and type(block.attn) is Attention and type(block.mlp) is Mlp
        if own and _is_whole(block):
            block.forward = functools.partial(_own_block, block, workspaces, overwrite)
        elif (_forward_of(block) is facebook_dit.dit_block and _forward_of(block.attn) is facebook_dit.attention
              and f"{type(block.mlp).__module__}.{type(block.mlp).__name__}" == _TIMM and _is_whole(block)):
            block.forward = functools.partial(_facebook_block, block, workspaces)
    return workspaces


def _forward_of(module):
    adapter = adapter_of(vars(module).get("forward"))
    return adapter and adapter.forward


def _products(block):
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2


def _is_whole(block):
    """Whether the block is four packed products, attention and a GELU between them, and rounds between them alike."""
    products = _products(block)
    if not all(type(product) is PackedProduct for product in products) or products[2].gelu is None:
        return False
    qkv, _, fc1, fc2 = products
    others = [child for part in (block.attn, block.mlp) for child in part.children() if child not in products]
    return (all(isinstance(child, (nn.Identity, nn.Dropout)) for child in others)
            and (fc1.reader is fc2 if fc2.precision == "int8" else fc1.out_dtype == qkv.out_dtype))


def _fused(block, workspaces, x, c, eps, overwrite):
    """x [B,S,D], c [B,D] -> [B,S,D]."""
    qkv, proj, fc1, fc2 = products = _products(block)
    return dit_block(x, rows(block.adaLN_modulation(c), x), *((product.packed, product.bias) for product in products),
                     heads=block.attn.num_heads, activation=fc1.activation, eps=eps, dtype=qkv.out_dtype,
                     workspace=workspaces.here, overwrite=overwrite)


def _is_watched(block):
    return watched(block.attn, block.mlp, *block.attn.children(), *block.mlp.children())


def _own_block(block, workspaces, overwrite, x, y, gate, c):
    """As DiTBlock.forward; with nothing owed before or after."""
    if y is not None or _is_watched(block):
        return DiTBlock.forward(block, x, y, gate, c)
    return _fused(block, workspaces, x, c, (_EPS, _EPS), overwrite), None, None


def _facebook_block(block, workspaces, x, c, *args, **kwargs):
    """As facebook_dit.dit_block."""
    if args or kwargs or _is_watched(block) or watched(block.norm1, block.norm2):
        return facebook_dit.dit_block(block, x, c, *args, **kwargs)
    return _fused(block, workspaces, x, c, (block.norm1.eps, block.norm2.eps), False)
