"""Flux.1 (diffusers FluxTransformer2DModel): double blocks, single blocks, joint attention in the order text, image."""
import torch

from difuse.integrations.parts import joined, plain_norm, watched
from difuse.integrations.processors import other_norms, other_processor
from difuse.integrations.registry import register
from difuse_kernels import (
    Stream,
    attention,
    gate_residual,
    gate_residual_norm_modulate,
    qk_norm_rope,
    qk_norm_rope_joint,
)

_FLUX = "diffusers.models.transformers.transformer_flux."


def head_norms(attn):
    """The query and key norms, of the image and of the text where there is one."""
    added = [] if attn.added_kv_proj_dim is None else [attn.norm_added_q, attn.norm_added_k]
    return [attn.norm_q, attn.norm_k, *added]


def other_flux_attention(attn, processor):
    """Why this attention is not what Flux.1 and Flux.2 compute by default with `processor`, or None."""
    if attn.fused_projections:
        return "its projections are fused (fuse_qkv_projections); unfuse them first"
    return other_norms(head_norms(attn)) or other_processor(attn, processor)


def heads(head_dim, *projected):
    """Projections [B,S,D] as [B,S,H,Dh]; under tensor parallelism H are this device's heads."""
    return (x.unflatten(-1, (-1, head_dim)) for x in projected)


def tables(rotary, x, length=None):
    """diffusers' (cos, sin) [S,Dh] hold every angle twice: [S,Dh/2] of each; with `length`, before and behind it."""
    if rotary is None:
        return (None, None) if length is None else ((None, None), (None, None))
    once = [table[:, ::2].to(x.device) for table in rotary]  # [S,Dh/2]
    return once if length is None else ([table[:length] for table in once], [table[length:] for table in once])


def text_and_image(attn, image, text, head_dim, text_tables, image_tables, key_bias=None):
    """Joint attention of text tokens [B,T,D], which come first, and image tokens [B,S,D] -> (image, text).

    Each stream has projections, query and key norms and rotary tables of its own. key_bias [B,T+S].
    """
    q, k, v = qk_norm_rope_joint([
        Stream(*heads(head_dim, attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)),
               attn.norm_added_q.weight, attn.norm_added_k.weight, None, None, *text_tables),
        Stream(*heads(head_dim, attn.to_q(image), attn.to_k(image), attn.to_v(image)),
               attn.norm_q.weight, attn.norm_k.weight, None, None, *image_tables)], eps=attn.norm_q.eps)
    out = attention(q, k, v, key_bias=key_bias).flatten(2)  # [B,T+S,D]
    text, image = out.split((text.shape[1], image.shape[1]), dim=1)  # its gradient is one concatenation
    return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)  # [B,S,D], [B,T,D]


@register(_FLUX + "FluxAttention", refuses=lambda attn: other_flux_attention(attn, "FluxAttnProcessor"),
          ops=("qk_norm_rope", "qk_norm_rope_joint", "attention"), kind="part")
def flux_attention(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None,
                   **kwargs):
    """Image tokens [B,S,D], in double blocks also text [B,T,D], which comes first; rotary tables [T+S,Dh]."""
    joint = encoder_hidden_states is not None
    if (kwargs or attention_mask is not None or joint != (self.added_kv_proj_dim is not None)
            or watched(*head_norms(self)) or other_flux_attention(self, "FluxAttnProcessor")):
        return type(self).forward(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb,
                                  **kwargs)
    if joint:
        return text_and_image(self, hidden_states, encoder_hidden_states, self.head_dim,
                              *tables(image_rotary_emb, hidden_states, encoder_hidden_states.shape[1]))
    q, k, v = heads(self.head_dim, self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states))
    cos, sin = tables(image_rotary_emb, hidden_states)
    q, k = qk_norm_rope(q, k, q_weight=self.norm_q.weight, k_weight=self.norm_k.weight, cos=cos, sin=sin,
                        eps=self.norm_q.eps)
    return attention(q, k, v).flatten(2)  # [B,S,D]


def clip(x):
    """float16 that overflowed, brought back to its largest finite value."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


@register(_FLUX + "FluxTransformerBlock", refuses=lambda block: plain_norm(block, "norm2", "norm2_context"),
          ops=("gate_residual", "gate_residual_norm_modulate"))
def flux_transformer_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None,
                           joint_attention_kwargs=None):
    """Image tokens [B,S,D], text tokens [B,T,D], temb [B,D] -> (text, image)."""
    if watched(self.norm2, self.norm2_context):
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
                                  joint_attention_kwargs)
    x, context = hidden_states, encoder_hidden_states
    h, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, emb=temb)
    c, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(context, emb=temb)
    attended, context_attended, *ip = self.attn(hidden_states=h, encoder_hidden_states=c,
                                                image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x, h = gate_residual_norm_modulate(x, attended, gate_msa, scale_mlp, shift_mlp, eps=self.norm2.eps)  # [B,S,D]
    x = gate_residual(x, self.ff(h), gate_mlp)  # [B,S,D]
    x = x + ip[0] if ip else x  # of an IP-Adapter
    context, c = gate_residual_norm_modulate(context, context_attended, c_gate_msa, c_scale_mlp, c_shift_mlp,
                                             eps=self.norm2_context.eps)  # [B,T,D]
    return clip(gate_residual(context, self.ff_context(c), c_gate_mlp)), x


@register(_FLUX + "FluxSingleTransformerBlock", ops=("gate_residual",))
def flux_single_transformer_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None,
                                  joint_attention_kwargs=None):
    """Attention and MLP in parallel over text and image together: [B,T+S,D] -> (text, image)."""
    text = encoder_hidden_states.shape[1]
    x = joined(encoder_hidden_states, hidden_states)  # [B,T+S,D]
    h, gate = self.norm(x, emb=temb)
    attended = self.attn(hidden_states=h, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    mlp = self.act_mlp(self.proj_mlp(h))  # [B,T+S,4*D]
    x = clip(gate_residual(x, self.proj_out(torch.cat((attended, mlp), dim=2)), gate))  # [B,T+S,D]
    return x[:, :text], x[:, text:]
