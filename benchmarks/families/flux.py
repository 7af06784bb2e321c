"""Flux.1: FluxTransformer2DModel."""
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from benchmarks.families.family import Draw, Family, randomise


def _positions(height, width):
    ids = torch.zeros(height, width, 3)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    return ids.flatten(0, 1)  # [S,3]


def _build():
    return randomise(FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6)))


def _inputs(dtype):
    draw = Draw(dtype)
    return {"hidden_states": draw(2, 15, 8), "encoder_hidden_states": draw(2, 7, 24), "pooled_projections": draw(2, 20),
            "timestep": draw.times(2), "guidance": draw.times(2), "img_ids": _positions(5, 3),
            "txt_ids": torch.zeros(7, 3), "return_dict": False}


def _tables(text, height, width):
    ids = torch.cat((torch.zeros(text, 3), _positions(height, width)))
    return FluxPosEmbed(10000, [16, 56, 56])(ids)


def _wide(cls):
    def make(dtype):
        draw = Draw(dtype)
        block = randomise(cls(3072, 24, 128)).to(dtype)
        return block, (), {"hidden_states": draw(1, 256, 3072), "encoder_hidden_states": draw(1, 64, 3072),
                           "temb": draw(1, 3072), "image_rotary_emb": _tables(64, 16, 16)}
    return make


FAMILY = Family(
    name="flux", title="Flux.1, diffusers", build=_build, inputs=_inputs, blocks=4,
    wide={"double block, 256 + 64 tokens": _wide(FluxTransformerBlock),
          "single block, 256 + 64 tokens": _wide(FluxSingleTransformerBlock)})
