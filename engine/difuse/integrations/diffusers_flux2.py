"""Flux.2 (diffusers Flux2Transformer2DModel): as Flux.1, with one modulation for all blocks of a kind and SwiGLU.

Modulation comes as [B,kD], [B,1,kD] or, where reference images have a timestep of their own, per token [B,S,kD].
"""
import torch

from difuse.integrations.diffusers_flux import clip, head_norms, heads, other_flux_attention, tables, text_and_image
from difuse.integrations.parts import joined, plain_norm, rows, watched
from difuse.integrations.processors import other_norms, other_processor
from difuse.integrations.registry import register
from difuse_kernels import (
    attention,
    gate_residual,
    gate_residual_norm_modulate,
    gated_activation,
    norm_modulate,
    qk_norm_rope,
)

_FLUX2 = "diffusers.models.transformers.transformer_flux2."


def _modulations(mod, count, x):
    """The `count` shifts, scales, gates, ... in `mod`: [B,D], or per token [B,S,D]."""
    if mod.dim() == 3:
        mod = mod[:, 0] if mod.shape[1] == 1 else mod
    return rows(mod, x).chunk(count, dim=-1)


@register(_FLUX2 + "Flux2SwiGLU", refuses=lambda swiglu: None if type(swiglu.gate_fn) is torch.nn.SiLU else
          f"its activation is {swiglu.gate_fn}", ops=("gated_activation",), kind="part")
def flux2_swiglu(self, x):
    """[...,2F] -> [...,F]: the SiLU of the first half times the second."""
    if watched(self.gate_fn):
        return type(self).forward(self, x)
    return gated_activation(x, activation="silu", act_on="first")  # [...,F]


@register(_FLUX2 + "Flux2Attention", refuses=lambda attn: other_flux_attention(attn, "Flux2AttnProcessor"),
          ops=("qk_norm_rope_joint", "attention"), kind="part")
def flux2_attention(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None,
                    **kwargs):
    """Image tokens [B,S,D] and text [B,T,D], which comes first; rotary tables [T+S,Dh]."""
    if (kwargs or attention_mask is not None or encoder_hidden_states is None or self.added_kv_proj_dim is None
            or watched(*head_norms(self)) or other_flux_attention(self, "Flux2AttnProcessor")):
        return type(self).forward(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb,
                                  **kwargs)
    return text_and_image(self, hidden_states, encoder_hidden_states, self.head_dim,
                          *tables(image_rotary_emb, hidden_states, encoder_hidden_states.shape[1]))


def _other_parallel_attention(attn):
    return other_norms((attn.norm_q, attn.norm_k)) or other_processor(attn, "Flux2ParallelSelfAttnProcessor")


@register(_FLUX2 + "Flux2ParallelSelfAttention", refuses=_other_parallel_attention, ops=("qk_norm_rope", "attention"),
          kind="part")
def flux2_parallel_self_attention(self, hidden_states, attention_mask=None, image_rotary_emb=None, **kwargs):
    """Attention and MLP between one projection, to q, k, v, gate and up, and one back: [B,S,D]; tables [S,Dh]."""
    if kwargs or attention_mask is not None or watched(self.norm_q, self.norm_k) or _other_parallel_attention(self):
        return type(self).forward(self, hidden_states, attention_mask, image_rotary_emb, **kwargs)
    projected = self.to_qkv_mlp_proj(hidden_states)  # [B,S,3*D+2*F]
    inner, mlp = self.inner_dim, self.mlp_hidden_dim * self.mlp_mult_factor
    width = projected.shape[-1] * inner // (3 * inner + mlp)  # less than D under tensor parallelism
    *qkv, mlp = projected.split((width, width, width, projected.shape[-1] - 3 * width), dim=-1)
    q, k, v = heads(self.head_dim, *qkv)
    cos, sin = tables(image_rotary_emb, hidden_states)
    q, k = qk_norm_rope(q, k, q_weight=self.norm_q.weight, k_weight=self.norm_k.weight, cos=cos, sin=sin,
                        eps=self.norm_q.eps)
    return self.to_out(torch.cat((attention(q, k, v).flatten(2), self.mlp_act_fn(mlp)), dim=-1))  # [B,S,D]


@register(_FLUX2 + "Flux2TransformerBlock",
          refuses=lambda block: plain_norm(block, "norm1", "norm1_context", "norm2", "norm2_context"),
          ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"))
def flux2_transformer_block(self, hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt,
                            image_rotary_emb=None, joint_attention_kwargs=None):
    """Image tokens [B,S,D], text tokens [B,T,D], six modulations for each -> (text, image)."""
    if watched(self.norm1, self.norm1_context, self.norm2, self.norm2_context):
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt,
                                  image_rotary_emb, joint_attention_kwargs)
    x, context = hidden_states, encoder_hidden_states
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = _modulations(temb_mod_img, 6, x)
    c_shift_msa, c_scale_msa, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = _modulations(temb_mod_txt, 6, context)
    attended, context_attended = self.attn(
        hidden_states=norm_modulate(x, scale_msa, shift_msa, eps=self.norm1.eps),  # [B,S,D]
        encoder_hidden_states=norm_modulate(context, c_scale_msa, c_shift_msa, eps=self.norm1_context.eps),  # [B,T,D]
        image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x, h = gate_residual_norm_modulate(x, attended, gate_msa, scale_mlp, shift_mlp, eps=self.norm2.eps)  # [B,S,D]
    x = gate_residual(x, self.ff(h), gate_mlp)  # [B,S,D]
    context, c = gate_residual_norm_modulate(context, context_attended, c_gate_msa, c_scale_mlp, c_shift_mlp,
                                             eps=self.norm2_context.eps)  # [B,T,D]
    return clip(gate_residual(context, self.ff_context(c), c_gate_mlp)), x


@register(_FLUX2 + "Flux2SingleTransformerBlock", refuses=lambda block: plain_norm(block, "norm"),
          ops=("norm_modulate", "gate_residual"))
def flux2_single_transformer_block(self, hidden_states, encoder_hidden_states, temb_mod, image_rotary_emb=None,
                                   joint_attention_kwargs=None, split_hidden_states=False, text_seq_len=None):
    """Text and image together [B,T+S,D], or the text apart, three modulations -> [B,T+S,D], or (text, image)."""
    if watched(self.norm):
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb_mod, image_rotary_emb,
                                  joint_attention_kwargs, split_hidden_states, text_seq_len)
    x = hidden_states
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        x = joined(encoder_hidden_states, x)  # [B,T+S,D]
    shift, scale, gate = _modulations(temb_mod, 3, x)
    attended = self.attn(hidden_states=norm_modulate(x, scale, shift, eps=self.norm.eps),
                         image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))  # [B,T+S,D]
    x = clip(gate_residual(x, attended, gate))  # [B,T+S,D]
    return (x[:, :text_seq_len], x[:, text_seq_len:]) if split_hidden_states else x
