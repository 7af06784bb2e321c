"""LTX-Video (diffusers LTXVideoTransformer3DModel): RMSNorms, one table of modulation a block, text not normed."""
from difuse.integrations.conditioning import cached
from difuse.integrations.parts import rows, watched
from difuse.integrations.processors import other_norms, other_processor, split_heads
from difuse.integrations.registry import register
from difuse_kernels import attention, gate_residual, gate_residual_norm_modulate, norm_modulate, qk_norm_rope

_LTX = "diffusers.models.transformers.transformer_ltx."


def _not_this_attention(attn):
    if attn.inner_kv_dim != attn.inner_dim:
        return f"its keys have {attn.inner_kv_dim} dimensions, its queries {attn.inner_dim}"
    return other_norms((attn.norm_q, attn.norm_k)) or other_processor(attn, "LTXVideoAttnProcessor")


def _keys_and_values(attn, context):
    """[B,T,D] -> normed keys, and values, [B,T,H,Dh]."""
    k, v = split_heads(attn, attn.to_k(context), attn.to_v(context))
    return qk_norm_rope(k, None, q_weight=attn.norm_k.weight, norm_scope="full", eps=attn.norm_k.eps)[0], v


def _no_bias_per_key(mask, context):
    """Whether a mask is anything but [B,1,T], added to the logits of every query alike."""
    return mask is not None and (context is None or not mask.is_floating_point()
                                 or mask.shape != (context.shape[0], 1, context.shape[1]))


@register(_LTX + "LTXAttention", refuses=_not_this_attention, ops=("qk_norm_rope", "attention"), kind="part")
def ltx_attention(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None,
                  **kwargs):
    """Tokens [B,S,D] with rotary tables [B,S,D], or their attention to a text [B,T,D] with a mask [B,1,T]."""
    across = encoder_hidden_states is not None
    if (kwargs or _no_bias_per_key(attention_mask, encoder_hidden_states) or (across and image_rotary_emb is not None)
            or watched(self.norm_q, self.norm_k) or _not_this_attention(self)):
        return type(self).forward(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb,
                                  **kwargs)
    eps = self.norm_q.eps
    q, = split_heads(self, self.to_q(hidden_states))
    bias = None
    if across:
        q, _ = qk_norm_rope(q, None, q_weight=self.norm_q.weight, norm_scope="full", eps=eps)
        k, v = cached(self, encoder_hidden_states, lambda: _keys_and_values(self, encoder_hidden_states))
        bias = None if attention_mask is None else attention_mask[:, 0]  # [B,T]
    else:
        k, v = split_heads(self, self.to_k(hidden_states), self.to_v(hidden_states))
        # the angles run over all D, so every head has its own: [B,S,H,Dh/2]
        cos, sin = (None, None) if image_rotary_emb is None else split_heads(
            self, *(table[..., ::2].expand(q.shape[0], -1, -1) for table in image_rotary_emb))
        q, k = qk_norm_rope(q, k, q_weight=self.norm_q.weight, k_weight=self.norm_k.weight, cos=cos, sin=sin,
                            norm_scope="full", eps=eps)
    out = attention(q, k, v, key_bias=bias).flatten(2)  # [B,S,D]
    return self.to_out[1](self.to_out[0](out))


def _not_this_block(block):
    if block.scale_shift_table.shape[0] != 6:
        return f"its table has {block.scale_shift_table.shape[0]} rows; expected 6"
    norms = block.norm1, block.norm2
    if any(type(norm).__name__ != "RMSNorm" for norm in norms):
        return f"its norms are {', '.join(map(str, norms))}; expected RMSNorms"
    return None


@register(_LTX + "LTXVideoTransformerBlock", refuses=_not_this_block,
          ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"))
def ltx_transformer_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None,
                          encoder_attention_mask=None):
    """Tokens [B,S,D], text [B,T,D], temb [B,1,6D], or [B,S,6D] of tokens with timesteps of their own."""
    x, norm1, norm2 = hidden_states, self.norm1, self.norm2
    if watched(norm1, norm2):
        return type(self).forward(self, x, encoder_hidden_states, temb, image_rotary_emb, encoder_attention_mask)
    temb = rows(temb[:, 0] if temb.shape[1] == 1 else temb, x)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = temb.chunk(6, dim=-1)  # each [B,D] or [B,S,D]
    shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift_table.unbind()  # each [D], added to them
    h = norm_modulate(x, scale_msa, shift_msa, scale_table=scale1, shift_table=shift1, norm="rms", weight=norm1.weight,
                      bias=norm1.bias, eps=norm1.eps)  # [B,S,D]
    y = self.attn1(hidden_states=h, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
    x = gate_residual(x, y, gate_msa, gate_table=gate1)  # [B,S,D], which the text is shown as it is
    y = self.attn2(x, encoder_hidden_states=encoder_hidden_states, image_rotary_emb=None,
                   attention_mask=encoder_attention_mask)
    x, h = gate_residual_norm_modulate(x, y, None, scale_mlp, shift_mlp, scale_table=scale2, shift_table=shift2,
                                       norm="rms", weight=norm2.weight, bias=norm2.bias, eps=norm2.eps)
    return gate_residual(x, self.ff(h), gate_mlp, gate_table=gate2)
