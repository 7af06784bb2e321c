"""A frozen DiT block in five passes over its tokens: norms and gates are computed by the products beside them.

For blocks of difuse's DiT and of facebookresearch's DiT and SiT, whose formulas are the same (Peebles & Xie 2023,
arXiv:2212.09748, adaLN-Zero).
"""
import functools

from torch import nn

from difuse.inference.packed import PackedProduct
from difuse.integrations import facebook_dit
from difuse.integrations.registry import adapter_of
from difuse.models.layers import Attention, DiTBlock, Mlp
from difuse_kernels import attention_packed

_EPS = 1e-6  # of the norms of difuse's DiT


def fuse_blocks(model):
    """Give every block of a frozen model's own copy that is known and whole the forward below."""
    for block in model.modules():
        if type(block) is DiTBlock:
            if _is_plain(block, Attention, Mlp):
                block.forward = functools.partial(_own_block, block)
        elif _forward_of(block) is facebook_dit.dit_block and _is_plain(block, None, None):
            block.forward = functools.partial(_facebook_block, block)


def _forward_of(module):
    adapter = adapter_of(vars(module).get("forward"))
    return adapter and adapter.forward


def _is_plain(block, attention, mlp):
    """Whether between the block's four products lie attention and a GELU that they compute, and nothing else."""
    attn, ff = block.attn, block.mlp
    known = (type(attn) is attention and type(ff) is mlp if attention else
             _forward_of(attn) is facebook_dit.attention and f"{type(ff).__module__}.{type(ff).__name__}" == _TIMM)
    if not known:
        return False
    products = [attn.qkv, attn.proj, ff.fc1, ff.fc2]
    others = [module for part in (attn, ff) for module in part.children() if module not in products]
    return (all(type(product) is PackedProduct for product in products) and ff.fc1.gelu is not None
            and all(isinstance(module, (nn.Identity, nn.Dropout)) for module in others))


_TIMM = "timm.layers.mlp.Mlp"


def _block(block, x, c, eps1, eps2):
    """x [B,S,D], c [B,D] -> [B,S,D]."""
    modulation = block.adaLN_modulation(c)  # [B,6*D]
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # each [B,D]
    qkv = block.attn.qkv(x, scale=scale_msa, shift=shift_msa, eps=eps1)  # [B,S,3*D]
    attended = attention_packed(qkv.unflatten(-1, (3, block.attn.num_heads, -1))).flatten(2)  # [B,S,D]
    x = block.attn.proj(attended, gate=gate_msa, residual=x)  # [B,S,D]
    h = block.mlp.fc1(x, scale=scale_mlp, shift=shift_mlp, eps=eps2)  # [B,S,F]
    return block.mlp.fc2(h, gate=gate_mlp, residual=x, overwrite=True)  # [B,S,D]


def _own_block(block, x, y, gate, c):
    """As DiTBlock.forward: x [B,S,D], c [B,D]. Nothing is owed: y and gate, of the block before, are None."""
    return _block(block, x, c, _EPS, _EPS), None, None


def _facebook_block(block, x, c, *args, **kwargs):
    """As facebook_dit.dit_block."""
    if args or kwargs:
        return type(block).forward(block, x, c, *args, **kwargs)
    return _block(block, x, c, block.norm1.eps, block.norm2.eps)
