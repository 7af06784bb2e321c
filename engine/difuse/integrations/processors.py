"""diffusers' attentions: which processor one has, whether the user chose another backend, its heads and their norms."""
import sys

from torch import nn


def split_heads(attn, *projected):
    """Projections [B,S,D] as [B,S,H,Dh]."""
    return (x.unflatten(-1, (attn.heads, -1)) for x in projected)


def other_norms(norms):
    """Why these query and key norms are not torch's RMSNorms of one eps, or None."""
    if any(type(norm) is not nn.RMSNorm or norm.eps is None or norm.eps != norms[0].eps for norm in norms):
        return f"its query and key norms are {', '.join(map(str, norms))}; expected RMSNorms of one eps"
    return None


def other_processor(attn, expected):
    """Why this attention is not the default one, computed by the processor class `expected`, on heads that the kernels
    take; or None."""
    processor = attn.processor
    if type(processor).__name__ != expected or not type(processor).__module__.startswith("diffusers."):
        return f"its processor is {type(processor).__name__}, not {expected}"
    if getattr(processor, "_attention_backend", None) is not None:
        return f"the attention backend {processor._attention_backend} was set on it"
    if getattr(processor, "_parallel_config", None) is not None:
        return "it runs in parallel over several devices"
    head_dim = getattr(attn, "head_dim", None) or attn.inner_dim // attn.heads
    if head_dim % 8 or head_dim > 256:
        return f"its heads have {head_dim} dimensions; the kernels take multiples of 8 up to 256"
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:  # nothing that chooses between backends was imported
        return None
    active = dispatch._AttentionBackendRegistry._active_backend
    if active != dispatch.AttentionBackendName.NATIVE:
        return f"diffusers' active attention backend is {active}"
    return None
