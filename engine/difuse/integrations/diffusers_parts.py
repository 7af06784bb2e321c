"""Parts that several diffusers models are made of: adaLN norms and gated activations."""
from difuse.integrations.parts import plain_norm, rows, watched
from difuse.integrations.registry import register
from difuse_kernels import gated_activation, norm_modulate

_NORMALIZATION = "diffusers.models.normalization."


def _not_plain(module):
    return plain_norm(module, "norm")


class Embedded:
    """A timestep with its embedding: takes the timestep's place on the way from a model to the norms of its blocks.

    timestep: what the model got. embedding [B,D], computed for hidden states of `dtype`.
    """

    def __init__(self, timestep, embedding, dtype):
        self.timestep, self.embedding, self.dtype = timestep, embedding, dtype


def modulation_of(norm, timestep, class_labels, hidden_dtype, emb=None):
    """shift, scale, gate of attention, then of the MLP, side by side [B,6*D], by an AdaLayerNormZero."""
    embedded, timestep = (timestep, timestep.timestep) if isinstance(timestep, Embedded) else (None, timestep)
    if embedded is not None and embedded.dtype == hidden_dtype:
        emb = embedded.embedding
    elif norm.emb is not None:
        emb = norm.emb(timestep, class_labels, hidden_dtype=hidden_dtype)  # [B,D]
    return norm.linear(norm.silu(emb))  # [B,6*D]


@register(_NORMALIZATION + "AdaLayerNormZero", refuses=_not_plain, ops=("norm_modulate",), kind="part")
def ada_layer_norm_zero(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    """x [B,S,D], timestep perhaps `Embedded` -> modulated norm; gate_msa, shift_mlp, scale_mlp, gate_mlp [B,D]."""
    if watched(self.norm):
        timestep = timestep.timestep if isinstance(timestep, Embedded) else timestep
        return type(self).forward(self, x, timestep, class_labels, hidden_dtype, emb)
    modulation = modulation_of(self, timestep, class_labels, hidden_dtype, emb)
    shift_msa, scale_msa, *others = rows(modulation, x).chunk(6, dim=1)  # each [B,D]
    x = x.contiguous()  # a patch embedding's convolution leaves the channels strided
    return norm_modulate(x, scale_msa, shift_msa, eps=self.norm.eps), *others


@register(_NORMALIZATION + "AdaLayerNormZeroSingle", refuses=_not_plain, ops=("norm_modulate",), kind="part")
def ada_layer_norm_zero_single(self, x, emb=None):
    """x [B,S,D] -> its modulated norm, and gate_msa [B,D]."""
    if watched(self.norm):
        return type(self).forward(self, x, emb)
    shift_msa, scale_msa, gate_msa = rows(self.linear(self.silu(emb)), x).chunk(3, dim=1)  # each [B,D]
    return norm_modulate(x, scale_msa, shift_msa, eps=self.norm.eps), gate_msa


def _not_continuous(module):
    norm = module.norm
    return None if type(norm).__name__ in ("LayerNorm", "RMSNorm") else f"norm is {norm}"


@register(_NORMALIZATION + "AdaLayerNormContinuous", refuses=_not_continuous, ops=("norm_modulate",), kind="part")
def ada_layer_norm_continuous(self, x, conditioning_embedding):
    """x [B,S,D] -> its modulated norm. Of the two chunks scale comes first here."""
    norm = self.norm
    if watched(norm):
        return type(self).forward(self, x, conditioning_embedding)
    modulation = self.linear(self.silu(conditioning_embedding).to(x.dtype))  # [B,2*D]
    scale, shift = rows(modulation, x).chunk(2, dim=1)  # each [B,D]
    return norm_modulate(x, scale, shift, norm="rms" if type(norm).__name__ == "RMSNorm" else "layer",
                         weight=norm.weight, bias=getattr(norm, "bias", None), eps=norm.eps)


@register("diffusers.models.activations.GEGLU", ops=("gated_activation",), kind="part")
def geglu(self, hidden_states, *args, **kwargs):
    """[...,D] -> [...,F]: the first half of the projection times the GELU of the second."""
    if args or kwargs:  # deprecated ones, which the class warns about
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return gated_activation(self.proj(hidden_states), activation="gelu", act_on="second")
