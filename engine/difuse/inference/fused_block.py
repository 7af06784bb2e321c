"""Frozen DiT blocks in one call each: `difuse_kernels.dit_block`.

For blocks of difuse's DiT, of facebookresearch's DiT and SiT and of diffusers' DiT, whose formulas are the same. With
somebody's hooks on its parts a block runs them one by one.
"""
import functools
import threading

import torch
from torch import nn

from difuse.inference.packed import PackedProduct, multiplies_bfloat16
from difuse.integrations import facebook_dit
from difuse.integrations.parts import rows, watched
from difuse.models import DiT
from difuse.models.layers import Attention, DiTBlock, Mlp
from difuse_kernels import Workspace, dit_block

_EPS = 1e-6  # of the norms of difuse's DiT
_TIMM, _DIFFUSERS = "timm.layers.mlp.Mlp", "diffusers.models.attention."


class Workspaces(threading.local):
    """A Workspace for each thread that calls a frozen model."""

    def __init__(self):
        self.here = Workspace()


class Fused:
    """A block's four products, the first one perhaps three, and what else `dit_block` needs to know.

    parts: the modules whose hooks it would not call.
    """

    def __init__(self, qkv, proj, fc1, fc2, heads, eps, parts, workspaces):
        self.products, self.qkv = (proj, fc1, fc2), qkv
        self.heads, self.eps, self.workspaces = heads, eps, workspaces
        self.parts = [*qkv, proj, fc1, fc2, *parts]
        self.dtype = torch.bfloat16 if fc2.precision == "bf16" or (
            fc2.precision == "int8" and multiplies_bfloat16()) else torch.float32

    def __call__(self, x, modulation, overwrite=False):
        """x [B,S,D], modulation [B or 1,6*D] -> [B,S,D]; None where somebody watches a part."""
        if watched(*self.parts):
            return None
        qkv = [(product.packed, product.bias) for product in self.qkv]
        return dit_block(x, rows(modulation, x), qkv[0] if len(qkv) == 1 else qkv,
                         *((product.packed, product.bias) for product in self.products), heads=self.heads,
                         activation=self.products[1].activation, eps=self.eps, dtype=self.dtype,
                         workspace=self.workspaces.here, overwrite=overwrite)


def fuse_blocks(model):
    """Give every block of a frozen model's own copy that is known and whole a forward below. Returns its Workspaces."""
    workspaces = Workspaces()
    overwrite = type(model).forward is DiT.forward  # which lets go of a block's x as soon as the next one has it
    for block in model.modules():
        accelerated = getattr(vars(block).get("forward"), "func", None)  # not one that must run on a certain backend
        if type(block) is DiTBlock and type(block.attn) is Attention and type(block.mlp) is Mlp:
            fused = _fused(block, [block.attn.qkv], block.attn, block.mlp, (_EPS, _EPS), workspaces)
            forward = functools.partial(_own_block, block, fused, overwrite)
        elif accelerated is facebook_dit.dit_block and _forward_of(block.attn) is facebook_dit.attention and (
                f"{type(block.mlp).__module__}.{type(block.mlp).__name__}" == _TIMM):
            fused = _fused(block, [block.attn.qkv], block.attn, block.mlp, (block.norm1.eps, block.norm2.eps),
                           workspaces, block.norm1, block.norm2)
            forward = functools.partial(_facebook_block, block, accelerated, fused)
        elif accelerated is not None and type(block).__module__ + "." == _DIFFUSERS:
            fused = _of_diffusers(block, accelerated, workspaces)
            forward = functools.partial(_diffusers_block, block, accelerated, fused)
        else:
            continue
        if fused is not None:
            block.forward = forward
    return workspaces


def _forward_of(module):
    return getattr(vars(module).get("forward"), "func", None)


def _fused(block, qkv, attn, mlp, eps, workspaces, *norms):
    """The `Fused` of a block whose products are named as DiT's, or None if they are not all there, or not alone."""
    products = *qkv, attn.proj, mlp.fc1, mlp.fc2
    parts = [attn, mlp, *_between(products, attn, mlp), *norms]
    return (Fused(qkv, attn.proj, mlp.fc1, mlp.fc2, attn.num_heads, eps, parts, workspaces)
            if _are_whole(products, attn.num_heads, attn, mlp) else None)


def _between(products, *parents):
    return [child for parent in parents for child in parent.children() if child not in products]


def _are_whole(products, heads, *parents):
    """Whether these fit together, packed in one precision, a GELU in the MLP, and nothing else between them."""
    if not all(type(product) is PackedProduct for product in products):
        return False
    *first, proj, fc1, fc2 = products
    D = fc2.out_features
    return (fc1.gelu is not None and len({product.precision for product in products}) == 1
            and {product.in_features for product in (*first, proj, fc1)} == {proj.out_features} == {D}
            and all(product.out_features == 3 * D // len(first) for product in first)
            and fc1.out_features == fc2.in_features and D % heads == 0 and D // heads % 8 == 0 and D // heads <= 256
            and all(isinstance(child, (nn.Identity, nn.Dropout)) for child in _between(products, *parents)))


def _of_diffusers(block, accelerated, workspaces):
    """The `Fused` of a block of diffusers' DiT, or None."""
    from difuse.integrations.diffusers_attention import diffusers_attention
    from difuse.integrations.diffusers_basic_block import basic_transformer_block
    from difuse.integrations.diffusers_parts import ada_layer_norm_zero

    if accelerated is not basic_transformer_block or block.norm_type != "ada_norm_zero" or block.attn2 is not None:
        return None
    attn, ff = block.attn1, block.ff
    if (_forward_of(attn) is not diffusers_attention or _forward_of(block.norm1) is not ada_layer_norm_zero
            or block._chunk_size is not None or block.norm3.weight is not None or block.only_cross_attention
            or len(ff.net) != 3):
        return None
    products = attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], ff.net[0], ff.net[2]
    if not _are_whole(products, attn.heads, attn.to_out, ff.net):
        return None
    parts = [attn, attn.to_out, ff, *_between(products, attn.to_out, ff.net), block.norm1.norm, block.norm3]
    return Fused(products[:3], *products[3:], attn.heads, (block.norm1.norm.eps, block.norm3.eps), parts, workspaces)


def _own_block(block, fused, overwrite, x, y, gate, c):
    """As DiTBlock.forward; with nothing owed before or after."""
    found = fused(x, block.adaLN_modulation(c), overwrite) if y is None else None
    return DiTBlock.forward(block, x, y, gate, c) if found is None else (found, None, None)


def _facebook_block(block, accelerated, fused, x, c, *args, **kwargs):
    """As facebook_dit.dit_block, which is `accelerated`."""
    found = None if args or kwargs else fused(x, block.adaLN_modulation(c))
    return accelerated(block, x, c, *args, **kwargs) if found is None else found


def _diffusers_block(block, accelerated, fused, hidden_states, attention_mask=None, encoder_hidden_states=None,
                     encoder_attention_mask=None, timestep=None, cross_attention_kwargs=None, class_labels=None,
                     added_cond_kwargs=None):
    """As diffusers_basic_block.basic_transformer_block, which is `accelerated`."""
    from difuse.integrations.diffusers_attention import PROCESSORS, attention_2_0
    from difuse.integrations.diffusers_parts import modulation_of

    found, x = None, hidden_states
    plain = PROCESSORS.get(type(block.attn1.processor).__name__) is attention_2_0  # it is changed at any time
    if plain and attention_mask is None and not cross_attention_kwargs and x.dim() == 3 and x.dtype == torch.float32:
        found = fused(x, modulation_of(block.norm1, timestep, class_labels, x.dtype))
    return found if found is not None else accelerated(
        block, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
        cross_attention_kwargs, class_labels, added_cond_kwargs)
