"""Qwen-Image (diffusers QwenImageTransformer2DModel): double blocks, joint attention in the order text, image.

Rotary tables are complex, one for each stream. With zero_cond_t the image tokens of a sample have two conditions:
its timestep where modulate_index is 0, time zero where it is 1 (reference images).
"""
import torch

from difuse.integrations.diffusers_attention import processor
from difuse.integrations.diffusers_flux import clip, text_and_image
from difuse.integrations.diffusers_sd3 import head_norms, other_head_norms
from difuse.integrations.parts import plain_norm, rows, watched
from difuse.integrations.registry import register
from difuse_kernels import gate_residual, gate_residual_norm_modulate, norm_modulate

_QWEN = "diffusers.models.transformers.transformer_qwenimage."


def _other_norms(attn):
    return other_head_norms(attn) or (None if len(head_norms(attn)) == 4 else "it lacks query and key norms")


def _real(rotary):
    """cos and sin, [S,Dh/2] each, of a complex table."""
    return torch.view_as_real(rotary).unbind(-1)


def _key_bias(mask, image):
    """What hides the padding of a bool text mask [B,T] in attention over text and image [B,S,D]: [B,T+S]."""
    bias = torch.zeros(mask.shape[0], mask.shape[1] + image.shape[1], device=image.device)  # [B,T+S]
    bias[:, : mask.shape[1]].masked_fill_(~mask, float("-inf"))
    return bias


@processor("QwenDoubleStreamAttnProcessor2_0", refuses=_other_norms)
def qwen_attention(attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
                   encoder_hidden_states_mask=None, image_rotary_emb=None, **kwargs):
    """Image tokens [B,S,D], text [B,T,D] with its bool mask [B,T] and complex rotary tables (image, text)."""
    mask, rotary = encoder_hidden_states_mask, image_rotary_emb
    if (kwargs or attention_mask is not None or encoder_hidden_states is None or watched(*head_norms(attn))
            or (mask is not None and mask.dtype != torch.bool)):
        return type(attn).forward(attn, hidden_states, encoder_hidden_states, attention_mask,
                                  encoder_hidden_states_mask=mask, image_rotary_emb=rotary, **kwargs)
    image, text = ((None, None), (None, None)) if rotary is None else map(_real, rotary)
    return text_and_image(attn, hidden_states, encoder_hidden_states, attn.inner_dim // attn.heads, text, image,
                          None if mask is None else _key_bias(mask, hidden_states))


def _modulations(mod, index, x):
    """shift, scale, gate of both norms, [B,D] each; of mod [2B,6*D] with an index [B,S] per token, [B,S,D] each."""
    if index is None:
        return rows(mod, x).chunk(6, dim=-1)
    first = (index == 0).unsqueeze(-1)  # [B,S,1]
    now, zero = (half.unsqueeze(1).chunk(6, dim=-1) for half in mod.chunk(2))
    return [torch.where(first, *both) for both in zip(now, zero, strict=True)]


@register(_QWEN + "QwenImageTransformerBlock",
          refuses=lambda block: plain_norm(block, "img_norm1", "img_norm2", "txt_norm1", "txt_norm2"),
          ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"))
def qwen_image_transformer_block(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb,
                                 image_rotary_emb=None, joint_attention_kwargs=None, modulate_index=None):
    """Image tokens [B,S,D], text tokens [B,T,D], temb [B,D], with zero_cond_t [2B,D] -> (text, image)."""
    if watched(self.img_norm1, self.img_norm2, self.txt_norm1, self.txt_norm2):
        return type(self).forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb,
                                  image_rotary_emb, joint_attention_kwargs, modulate_index)
    x, context = hidden_states, encoder_hidden_states
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulations(self.img_mod(temb), modulate_index, x)
    temb = temb.chunk(2)[0] if self.zero_cond_t else temb
    c_shift1, c_scale1, c_gate1, c_shift2, c_scale2, c_gate2 = _modulations(self.txt_mod(temb), None, context)
    attended, context_attended = self.attn(
        hidden_states=norm_modulate(x, scale1, shift1, eps=self.img_norm1.eps),  # [B,S,D]
        encoder_hidden_states=norm_modulate(context, c_scale1, c_shift1, eps=self.txt_norm1.eps),  # [B,T,D]
        encoder_hidden_states_mask=encoder_hidden_states_mask, image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}))
    x, h = gate_residual_norm_modulate(x, attended, gate1, scale2, shift2, eps=self.img_norm2.eps)  # [B,S,D]
    context, c = gate_residual_norm_modulate(context, context_attended, c_gate1, c_scale2, c_shift2,
                                             eps=self.txt_norm2.eps)  # [B,T,D]
    x = gate_residual(x, self.img_mlp(h), gate2)  # [B,S,D]
    context = gate_residual(context, self.txt_mlp(c), c_gate2)  # [B,T,D]
    return clip(context), clip(x)
