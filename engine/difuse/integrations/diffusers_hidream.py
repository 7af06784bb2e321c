"""HiDream-I1 (diffusers HiDreamImageTransformer2DModel): double and single blocks, joint order image, text."""
from torch.nn import functional as F

from difuse.integrations.parts import plain_norm, rows, watched
from difuse.integrations.processors import other_norms, other_processor, split_heads
from difuse.integrations.registry import register
from difuse_kernels import (
    Stream,
    attention,
    gate_residual,
    gate_residual_norm_modulate,
    norm_modulate,
    qk_norm_rope,
    qk_norm_rope_joint,
)

_HIDREAM = "diffusers.models.transformers.transformer_hidream_image."


def _norms(attn):
    return [attn.q_rms_norm, attn.k_rms_norm] + ([] if attn.single else [attn.q_rms_norm_t, attn.k_rms_norm_t])


def _not_this_attention(attn):
    return other_norms(_norms(attn)) or other_processor(attn, "HiDreamAttnProcessor")


@register(_HIDREAM + "HiDreamAttention", refuses=_not_this_attention,
          ops=("qk_norm_rope", "qk_norm_rope_joint", "attention"), kind="part")
def hidream_attention(self, norm_hidden_states, hidden_states_masks=None, norm_encoder_hidden_states=None,
                      image_rotary_emb=None):
    """Image tokens [B,S,D], in double blocks also text [B,T,D], which comes second; a mask [B,S] of ones and zeros.

    image_rotary_emb [B,S+T,1,P,2,2]: rotation matrices, for all pairs of a head, or for those of its first half.
    """
    x, context, mask = norm_hidden_states, norm_encoder_hidden_states, hidden_states_masks
    if (image_rotary_emb is None or (context is None) != self.single or watched(*_norms(self))
            or _not_this_attention(self)):
        return type(self).forward(self, x, mask, context, image_rotary_emb)
    cos, sin = rows(image_rotary_emb, x)[:, :, 0, :, :, 0].unbind(-1)  # [B,S+T,P]
    q, k, v = split_heads(self, self.to_q(x), self.to_k(x), self.to_v(x))
    image, eps = x.shape[1], self.q_rms_norm.eps
    if self.single:
        q, k = qk_norm_rope(q, k, q_weight=self.q_rms_norm.weight, k_weight=self.k_rms_norm.weight, cos=cos, sin=sin,
                            norm_scope="full", eps=eps)
    else:
        text = split_heads(self, self.to_q_t(context), self.to_k_t(context), self.to_v_t(context))
        q, k, v = qk_norm_rope_joint([
            Stream(q, k, v, self.q_rms_norm.weight, self.k_rms_norm.weight, cos=cos[:, :image], sin=sin[:, :image]),
            Stream(*text, self.q_rms_norm_t.weight, self.k_rms_norm_t.weight, cos=cos[:, image:], sin=sin[:, image:])],
            norm_scope="full", eps=eps)
    if mask is not None:  # hidden keys become zero and keep their share of the softmax
        k = k * F.pad(mask.view(mask.shape[0], -1), (0, k.shape[1] - image), value=1)[:, :, None, None].to(k.dtype)
    out = attention(q, k, v).flatten(2)  # [B,S+T,D]
    if self.single:
        return self.to_out(out)
    return self.to_out(out[:, :image]), self.to_out_t(out[:, image:])  # [B,S,D], [B,T,D]


@register(_HIDREAM + "HiDreamImageTransformerBlock",
          refuses=lambda block: plain_norm(block, "norm1_i", "norm1_t", "norm3_i", "norm3_t"),
          ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"))
def hidream_double_block(self, hidden_states, hidden_states_masks=None, encoder_hidden_states=None, temb=None,
                         image_rotary_emb=None):
    """Image tokens [B,S,D], text tokens [B,T,D], temb [B,D] -> (image, text)."""
    x, context = hidden_states, encoder_hidden_states
    if watched(self.norm1_i, self.norm1_t, self.norm3_i, self.norm3_t):
        return type(self).forward(self, x, hidden_states_masks, context, temb, image_rotary_emb)
    (shift_msa_i, scale_msa_i, gate_msa_i, shift_mlp_i, scale_mlp_i, gate_mlp_i,
     shift_msa_t, scale_msa_t, gate_msa_t, shift_mlp_t, scale_mlp_t, gate_mlp_t) = (
        rows(self.adaLN_modulation(temb), x).chunk(12, dim=-1))  # each [B,D]
    h = norm_modulate(x, scale_msa_i, shift_msa_i, eps=self.norm1_i.eps)  # [B,S,D]
    c = norm_modulate(context, scale_msa_t, shift_msa_t, eps=self.norm1_t.eps)  # [B,T,D]
    h, c = self.attn1(h, hidden_states_masks, c, image_rotary_emb=image_rotary_emb)
    x, h = gate_residual_norm_modulate(x, h, gate_msa_i, scale_mlp_i, shift_mlp_i, eps=self.norm3_i.eps)
    context, c = gate_residual_norm_modulate(context, c, gate_msa_t, scale_mlp_t, shift_mlp_t, eps=self.norm3_t.eps)
    return gate_residual(x, self.ff_i(h), gate_mlp_i), gate_residual(context, self.ff_t(c), gate_mlp_t)


@register(_HIDREAM + "HiDreamImageSingleTransformerBlock",
          refuses=lambda block: plain_norm(block, "norm1_i", "norm3_i"),
          ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"))
def hidream_single_block(self, hidden_states, hidden_states_masks=None, encoder_hidden_states=None, temb=None,
                         image_rotary_emb=None):
    """Image and text together [B,S+T,D], temb [B,D]."""
    x = hidden_states
    if watched(self.norm1_i, self.norm3_i):
        return type(self).forward(self, x, hidden_states_masks, encoder_hidden_states, temb, image_rotary_emb)
    modulation = rows(self.adaLN_modulation(temb), x)  # [B,6*D]
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)  # each [B,D]
    h = norm_modulate(x, scale_msa, shift_msa, eps=self.norm1_i.eps)  # [B,S+T,D]
    h = self.attn1(h, hidden_states_masks, image_rotary_emb=image_rotary_emb)
    x, h = gate_residual_norm_modulate(x, h, gate_msa, scale_mlp, shift_mlp, eps=self.norm3_i.eps)
    return gate_residual(x, self.ff_i(h), gate_mlp)
