"""Stable Diffusion 3 (diffusers SD3Transformer2DModel): joint attention in the order image, text. arXiv:2403.03206.

SD 3.5 normalises queries and keys and, in its first blocks, attends to the image alone as well, modulated once more.
"""
from difuse.integrations.diffusers_attention import processor
from difuse.integrations.diffusers_flux import heads
from difuse.integrations.parts import plain_norm, rows, watched
from difuse.integrations.registry import full_name, register
from difuse_kernels import (
    Stream,
    attention,
    gate_residual,
    gate_residual_norm_modulate,
    norm_modulate_dual,
    qk_norm_rope,
    qk_norm_rope_joint,
)

_NORMALIZATION = "diffusers.models.normalization."
_RMS_NORMS = _NORMALIZATION + "RMSNorm", "torch.nn.modules.normalization.RMSNorm"


def head_norms(attn):
    """Those query and key norms of an `Attention` that are there."""
    return [norm for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k) if norm is not None]


def other_head_norms(attn):
    """Why the query and key norms of an `Attention` are neither absent nor RMSNorms of one eps, or None."""
    norms = head_norms(attn)
    wanted = 2 if attn.added_kv_proj_dim is None else 4
    if norms and (len(norms) != wanted or any(
            full_name(type(norm)) not in _RMS_NORMS or getattr(norm, "bias", None) is not None or norm.eps is None
            or norm.eps != norms[0].eps for norm in norms)):
        return f"its query and key norms are {', '.join(map(str, norms))}; expected none, or RMSNorms of one eps"
    return None


@processor("JointAttnProcessor2_0", refuses=other_head_norms)
def joint_attention(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
    """Image tokens [B,S,D], then text [B,T,D] if there is one -> (image, text), or the image."""
    image, text = hidden_states, encoder_hidden_states
    if (kwargs or attention_mask is not None or (text is None) != (attn.added_kv_proj_dim is None)
            or watched(*head_norms(attn))):
        return type(attn).forward(attn, image, text, attention_mask, **kwargs)
    head_dim = attn.inner_dim // attn.heads
    q, k, v = heads(head_dim, attn.to_q(image), attn.to_k(image), attn.to_v(image))  # each [B,S,H,Dh]
    kind, eps = (None, 0.0) if attn.norm_q is None else ("rms", attn.norm_q.eps)
    q_weight, k_weight, *added_weights = [norm.weight for norm in head_norms(attn)] or [None] * 4
    if text is None:
        if kind is not None:
            q, k = qk_norm_rope(q, k, q_weight=q_weight, k_weight=k_weight, eps=eps)
        return attn.to_out[1](attn.to_out[0](attention(q, k, v).flatten(2)))  # [B,S,D]
    added = heads(head_dim, attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    q, k, v = qk_norm_rope_joint([Stream(q, k, v, q_weight, k_weight), Stream(*added, *added_weights)], norm=kind,
                                 eps=eps)
    image, text = attention(q, k, v).flatten(2).split((image.shape[1], text.shape[1]), dim=1)
    if not attn.context_pre_only:
        text = attn.to_add_out(text)
    return attn.to_out[1](attn.to_out[0](image)), text  # [B,S,D], [B,T,D]


@register(_NORMALIZATION + "SD35AdaLayerNormZeroX", refuses=lambda module: plain_norm(module, "norm"),
          ops=("norm_modulate_dual",), kind="part")
def sd35_ada_layer_norm_zero_x(self, hidden_states, emb=None):
    """[B,S,D] -> its modulated norm, gate_msa, shift_mlp, scale_mlp, gate_mlp, the norm modulated anew, gate_msa2."""
    if watched(self.norm):
        return type(self).forward(self, hidden_states, emb)
    modulation = rows(self.linear(self.silu(emb)), hidden_states)  # [B,9*D]
    shift_msa, scale_msa, *others, shift_msa2, scale_msa2, gate_msa2 = modulation.chunk(9, dim=1)  # each [B,D]
    h, h2 = norm_modulate_dual(hidden_states, scale_msa, shift_msa, scale_msa2, shift_msa2, eps=self.norm.eps)
    return h, *others, h2, gate_msa2


def _not_plain(block):
    return plain_norm(block, "norm2", *([] if block.context_pre_only else ["norm2_context"]))


@register("diffusers.models.attention.JointTransformerBlock", refuses=_not_plain,
          ops=("gate_residual", "gate_residual_norm_modulate"))
def joint_transformer_block(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
    """Image tokens [B,S,D], text tokens [B,T,D], temb [B,D] -> (text, image); text None after the last block."""
    norms = [self.norm2] if self.context_pre_only else [self.norm2, self.norm2_context]
    if self._chunk_size is not None or watched(*norms):
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    x, context, options = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    h, gate_msa, shift_mlp, scale_mlp, gate_mlp, *dual = self.norm1(x, emb=temb)
    if self.context_pre_only:
        c, c_mlp = self.norm1_context(context, temb), None  # [B,T,D]
    else:
        c, *c_mlp = self.norm1_context(context, emb=temb)
    attended, context_attended = self.attn(hidden_states=h, encoder_hidden_states=c, **options)  # [B,S,D], [B,T,D]
    if self.use_dual_attention:
        h2, gate_msa2 = dual
        x = gate_residual(x, attended, gate_msa)  # [B,S,D]
        attended, gate_msa = self.attn2(hidden_states=h2, **options), gate_msa2
    x, h = gate_residual_norm_modulate(x, attended, gate_msa, scale_mlp, shift_mlp, eps=self.norm2.eps)  # [B,S,D]
    x = gate_residual(x, self.ff(h), gate_mlp)  # [B,S,D]
    if self.context_pre_only:
        return None, x
    c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = c_mlp
    context, c = gate_residual_norm_modulate(context, context_attended, c_gate_msa, c_scale_mlp, c_shift_mlp,
                                             eps=self.norm2_context.eps)  # [B,T,D]
    return gate_residual(context, self.ff_context(c), c_gate_mlp), x


@register("diffusers.models.transformers.transformer_sd3.SD3SingleTransformerBlock",
          refuses=lambda block: plain_norm(block, "norm2"), ops=("gate_residual", "gate_residual_norm_modulate"))
def sd3_single_transformer_block(self, hidden_states, temb):
    """Image tokens [B,S,D], temb [B,D] -> [B,S,D]; of ControlNets."""
    if watched(self.norm2):
        return type(self).forward(self, hidden_states, temb)
    h, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
    attended = self.attn(hidden_states=h, encoder_hidden_states=None)  # [B,S,D]
    x, h = gate_residual_norm_modulate(hidden_states, attended, gate_msa, scale_mlp, shift_mlp, eps=self.norm2.eps)
    return gate_residual(x, self.ff(h), gate_mlp)  # [B,S,D]
