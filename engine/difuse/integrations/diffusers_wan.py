"""Wan 2.1 and 2.2 (diffusers WanTransformer3DModel): T2V, I2V with image tokens, TI2V with a timestep per token."""
from torch import nn

from difuse.integrations.conditioning import cached
from difuse.integrations.parts import plain_norm, rows, watched
from difuse.integrations.processors import other_norms, other_processor, split_heads
from difuse.integrations.registry import register
from difuse_kernels import attention, gate_residual, gate_residual_norm_modulate, norm_modulate, qk_norm_rope

_WAN = "diffusers.models.transformers.transformer_wan."
_TEXT = 512  # tokens at the end of the conditioning; what comes before them is the image, where there is one


def _norms(attn):
    return [attn.norm_q, attn.norm_k] + ([] if attn.add_k_proj is None else [attn.norm_added_k])


def _not_this_attention(attn):
    if attn.fused_projections:
        return "its projections are fused (fuse_projections); unfuse them first"
    return other_norms(_norms(attn)) or other_processor(attn, "WanAttnProcessor")


def _keys_and_values(attn, context):
    """[B,T,D] -> normed keys and values [B,T,H,Dh] of the text, then of the image, where the model has one."""
    sources = [(context, attn.to_k, attn.to_v, attn.norm_k)]
    if attn.add_k_proj is not None:
        image = context.shape[1] - _TEXT
        sources = [(context[:, image:], attn.to_k, attn.to_v, attn.norm_k),
                   (context[:, :image], attn.add_k_proj, attn.add_v_proj, attn.norm_added_k)]
    pairs = []
    for tokens, to_k, to_v, norm in sources:
        k, v = split_heads(attn, to_k(tokens), to_v(tokens))
        k = qk_norm_rope(k, None, q_weight=norm.weight, norm_scope="full", eps=norm.eps)[0]
        pairs.append((k, v))
    return pairs


@register(_WAN + "WanAttention", refuses=_not_this_attention, ops=("qk_norm_rope", "attention"), kind="part")
def wan_attention(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **kwargs):
    """Tokens [B,S,D] with rotary tables [1,S,1,Dh], or their attention to a conditioning [B,T,D]."""
    across = encoder_hidden_states is not None
    if (kwargs or attention_mask is not None or (rotary_emb is not None if across else self.add_k_proj is not None)
            or any(table.dim() != 4 or table.shape[::2] != (1, 1) for table in rotary_emb or ())
            or watched(*_norms(self)) or _not_this_attention(self)):
        return type(self).forward(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs)
    eps = self.norm_q.eps
    q, = split_heads(self, self.to_q(hidden_states))
    if across:
        q, _ = qk_norm_rope(q, None, q_weight=self.norm_q.weight, norm_scope="full", eps=eps)
        (k, v), *image = cached(self, encoder_hidden_states, lambda: _keys_and_values(self, encoder_hidden_states))
        out = attention(q, k, v)  # [B,S,H,Dh]
        for k, v in image:
            out = out + attention(q, k, v)
    else:
        k, v = split_heads(self, self.to_k(hidden_states), self.to_v(hidden_states))
        cos, sin = (None, None) if rotary_emb is None else (
            rotary_emb[0][0, :, 0, ::2], rotary_emb[1][0, :, 0, 1::2])  # [S,Dh/2]
        q, k = qk_norm_rope(q, k, q_weight=self.norm_q.weight, k_weight=self.norm_k.weight, cos=cos, sin=sin,
                            norm_scope="full", eps=eps)
        out = attention(q, k, v)
    return self.to_out[1](self.to_out[0](out.flatten(2)))  # [B,S,D]


def _not_this_block(block):
    if type(block.norm2).__name__ not in ("FP32LayerNorm", "Identity"):
        return f"norm2 is {block.norm2}"
    return plain_norm(block, "norm1", "norm3")


@register(_WAN + "WanTransformerBlock", refuses=_not_this_block,
          ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"))
def wan_transformer_block(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
    """Tokens [B,S,D], conditioning [B,T,D], temb [B,6,D], or [B,S,6,D] of tokens with timesteps of their own."""
    x = hidden_states
    if watched(self.norm1, self.norm2, self.norm3):
        return type(self).forward(self, x, encoder_hidden_states, temb, rotary_emb)
    temb = rows(temb, x)
    shift_msa, scale_msa, gate_msa, c_shift_msa, c_scale_msa, c_gate_msa = temb.unbind(-2)  # each [B,D] or [B,S,D]
    shift, scale, gate, c_shift, c_scale, c_gate = self.scale_shift_table[0].unbind()  # each [D], added to them
    h = norm_modulate(x, scale_msa, shift_msa, scale_table=scale, shift_table=shift, eps=self.norm1.eps)  # [B,S,D]
    y = self.attn1(h, None, None, rotary_emb)
    if isinstance(self.norm2, nn.Identity):
        x = h = gate_residual(x, y, gate_msa, gate_table=gate)
    else:
        x, h = gate_residual_norm_modulate(x, y, gate_msa, gate_table=gate, weight=self.norm2.weight,
                                           bias=self.norm2.bias, eps=self.norm2.eps)
    y = self.attn2(h, encoder_hidden_states, None, None)
    x, h = gate_residual_norm_modulate(x, y, None, c_scale_msa, c_shift_msa, scale_table=c_scale, shift_table=c_shift,
                                       eps=self.norm3.eps)
    return gate_residual(x, self.ffn(h), c_gate_msa, gate_table=c_gate)
