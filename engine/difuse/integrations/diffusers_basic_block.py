"""diffusers' BasicTransformerBlock: of DiT (norm_type ada_norm_zero), PixArt (ada_norm_single), UNets (layer_norm)."""
import torch

from difuse.integrations.parts import is_layer_norm, watched
from difuse.integrations.registry import register
from difuse_kernels import gate_residual, gate_residual_norm_modulate, norm_modulate


def _norms(block):
    """The norms that the fused forward does not call."""
    names = {"ada_norm_zero": ("norm2", "norm3"), "ada_norm_single": ("norm1", "norm2"),
             "layer_norm": ("norm2", "norm3")}[block.norm_type]
    return [getattr(block, name) for name in names if getattr(block, name) is not None]


def _not_this_block(block):
    if block.norm_type not in ("ada_norm_zero", "ada_norm_single", "layer_norm"):
        return f"norm_type is {block.norm_type}; fused are ada_norm_zero, ada_norm_single and layer_norm"
    if block.pos_embed is not None:
        return f"pos_embed is {block.pos_embed}; expected none"
    odd = [norm for norm in _norms(block) if not is_layer_norm(norm)]
    return f"one of its norms is {odd[0]}; expected LayerNorm" if odd else None


def _of(norm):
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}


@register("diffusers.models.attention.BasicTransformerBlock", refuses=_not_this_block,
          ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"))
def basic_transformer_block(self, hidden_states, attention_mask=None, encoder_hidden_states=None,
                            encoder_attention_mask=None, timestep=None, cross_attention_kwargs=None, class_labels=None,
                            added_cond_kwargs=None):
    """x [B,S,D] -> [B,S,D]. With ada_norm_single timestep is the embedding [B,6*D], else the timesteps [B]."""
    x = hidden_states
    if cross_attention_kwargs or self._chunk_size is not None or x.dim() != 3 or watched(*_norms(self)):
        return type(self).forward(self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
                                  timestep, cross_attention_kwargs, class_labels, added_cond_kwargs)
    x = x.contiguous()  # [B,S,D]; a patch embedding's convolution leaves the channels strided
    single = self.norm_type == "ada_norm_single"
    gate = scale_mlp = shift_mlp = gate_mlp = None
    if single:
        modulation = self.scale_shift_table + timestep.reshape(x.shape[0], 6, -1)  # [B,6,D]
        x = x.to(torch.promote_types(x.dtype, modulation.dtype))  # as eager's residual, where the table is wider
        shift_msa, scale_msa, gate, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(1)  # each [B,D]
        h = norm_modulate(x, scale_msa, shift_msa, **_of(self.norm1))  # [B,S,D]
    elif self.norm_type == "ada_norm_zero":
        h, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
    else:
        h = self.norm1(x)  # [B,S,D]
    y = self.attn1(h, encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
                   attention_mask=attention_mask)  # [B,S,D]
    if self.attn2 is not None:
        if single:
            x = h = gate_residual(x, y, gate)  # [B,S,D], not normed
        else:
            x, h = gate_residual_norm_modulate(x, y, gate, **_of(self.norm2))  # [B,S,D]
        y = self.attn2(h, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        gate = None
    norm = self.norm2 if single else self.norm3
    x, h = gate_residual_norm_modulate(x, y, gate, scale_mlp, shift_mlp, **_of(norm))  # [B,S,D]
    return gate_residual(x, self.ff(h), gate_mlp)  # [B,S,D]
