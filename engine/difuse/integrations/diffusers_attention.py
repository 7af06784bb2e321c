"""diffusers' Attention, a class that many models share. What it computes is its processor's: one function for each.

Other families add theirs from their own files, which FILES names:

    @processor("JointAttnProcessor2_0", refuses=...)
    def joint_attention(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs): ...
"""
import importlib

from difuse.integrations.conditioning import cached
from difuse.integrations.processors import other_processor
from difuse.integrations.registry import register
from difuse_kernels import attention

FILES = {  # class name of a processor -> the file of this package that registers its function
    "JointAttnProcessor2_0": "diffusers_sd3",
    "QwenDoubleStreamAttnProcessor2_0": "diffusers_qwenimage",
}
PROCESSORS = {}  # class name of a processor -> function of (attn, and what Attention.forward takes)
_refusals = {}  # class name of a processor -> function of attn: why its options are not honoured, or None


def processor(name, *, refuses):
    """Decorator: the function below it computes what diffusers' processor class `name` does. See `attention_2_0`."""
    def add(function):
        PROCESSORS[name], _refusals[name] = function, refuses
        return function
    return add


def _not_this_attention(attn):
    name = type(attn.processor).__name__
    if name not in PROCESSORS and name in FILES:
        importlib.import_module(f"difuse.integrations.{FILES[name]}")
    if name not in PROCESSORS:
        return f"its processor is {name}, which has no fused equivalent"
    return other_processor(attn, name) or _refusals[name](attn)


@register("diffusers.models.attention_processor.Attention", refuses=_not_this_attention,
          ops=("qk_norm_rope", "qk_norm_rope_joint", "attention"), kind="part")
def diffusers_attention(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **cross_attention_kwargs):
    """Hands the call to the function for this module's processor."""
    if _not_this_attention(self):  # by now: processors are changed at any time
        return type(self).forward(self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
    return PROCESSORS[type(self.processor).__name__](self, hidden_states, encoder_hidden_states, attention_mask,
                                                     **cross_attention_kwargs)


def _options_of_2_0(attn):
    """AttnProcessor2_0 reads these; upcast_attention, upcast_softmax, scale and is_causal it does not."""
    for name in ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k"):
        if getattr(attn, name) is not None:
            return f"{name} is {getattr(attn, name)}; expected none"
    if attn.residual_connection or attn.rescale_output_factor != 1:
        return "it adds its input or rescales its output"
    if attn.inner_dim % attn.heads or attn.inner_kv_dim != attn.inner_dim:
        return (f"its {attn.heads} heads share {attn.inner_dim} for queries, {attn.inner_kv_dim} for keys; expected "
                "one width for both")
    return None


def _key_bias(mask, keys):
    """What is added to the logits [B,Sk] of keys [B,Sk,D], from a mask [B,Sk] or [B,1,Sk]; None for another mask."""
    batch, tokens, _ = keys.shape
    if not mask.is_floating_point() or mask.shape not in ((batch, tokens), (batch, 1, tokens)):
        return None
    return mask.view(batch, tokens)


@processor("AttnProcessor2_0", refuses=_options_of_2_0)
def attention_2_0(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
    """x [B,S,D] looks at itself, or at encoder_hidden_states [B,T,E] -> [B,S,D]."""
    x, context = hidden_states, hidden_states if encoder_hidden_states is None else encoder_hidden_states
    plain = not kwargs and x.dim() == context.dim() == 3 and x.shape[0] == context.shape[0]
    key_bias = _key_bias(attention_mask, context) if plain and attention_mask is not None else None  # [B,T]
    if not plain or (attention_mask is not None and key_bias is None):
        return type(attn).forward(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

    def heads(projected):
        return projected.unflatten(-1, (attn.heads, -1))  # [B,S,H,Dh]

    def keys_and_values():
        return heads(attn.to_k(context)), heads(attn.to_v(context))  # each [B,T,H,Dh]

    q = heads(attn.to_q(x))
    k, v = keys_and_values() if context is x else cached(attn, context, keys_and_values)
    out = attention(q, k, v, key_bias=key_bias).flatten(2)  # [B,S,D]
    return attn.to_out[1](attn.to_out[0](out))  # [B,S,D]
