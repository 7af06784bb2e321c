"""Flux.2: Flux2Transformer2DModel."""
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2PosEmbed,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)

from benchmarks.families.family import Draw, Family, randomise


def _ids(text, height, width):
    ids = torch.zeros(text + height * width, 4)
    ids[:text, 3] = torch.arange(text)
    ids[text:, 1:3] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return ids[:text], ids[text:]  # [T,4], [S,4]


def _build():
    return randomise(Flux2Transformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4)))


def _inputs(dtype):
    draw = Draw(dtype)
    txt_ids, img_ids = _ids(7, 5, 3)
    return {"hidden_states": draw(2, 15, 8), "encoder_hidden_states": draw(2, 7, 24), "timestep": draw.times(2),
            "guidance": draw.times(2), "img_ids": img_ids, "txt_ids": txt_ids, "return_dict": False}


def _tables():
    return Flux2PosEmbed(2000, [32, 32, 32, 32])(torch.cat(_ids(64, 16, 16)))


def _double(dtype):
    draw = Draw(dtype)
    block = randomise(Flux2TransformerBlock(3072, 24, 128)).to(dtype)
    return block, (), {"hidden_states": draw(1, 256, 3072), "encoder_hidden_states": draw(1, 64, 3072),
                       "temb_mod_img": draw(1, 18432), "temb_mod_txt": draw(1, 18432), "image_rotary_emb": _tables()}


def _single(dtype):
    draw = Draw(dtype)
    block = randomise(Flux2SingleTransformerBlock(3072, 24, 128)).to(dtype)
    return block, (), {"hidden_states": draw(1, 320, 3072), "encoder_hidden_states": None, "temb_mod": draw(1, 9216),
                       "image_rotary_emb": _tables()}


FAMILY = Family(
    name="flux2", title="Flux.2, diffusers", build=_build, inputs=_inputs, blocks=4,
    wide={"double block, 256 + 64 tokens": _double, "single block, 256 + 64 tokens": _single})
