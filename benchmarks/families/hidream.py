"""HiDream-I1: HiDreamImageTransformer2DModel.

Without routed experts: their choice jumps where a score rounds the other way, in eager as in ours.
"""
import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import (
    HiDreamImageEmbedND,
    HiDreamImageSingleTransformerBlock,
    HiDreamImageTransformerBlock,
)

from benchmarks.families.family import Draw, Family, randomise


def build(**options):
    """The small model; `options` of HiDreamImageTransformer2DModel change it."""
    return randomise(HiDreamImageTransformer2DModel(**{
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "attention_head_dim": 16, "num_attention_heads": 3, "caption_channels": [20, 28], "text_emb_dim": 12,
        "num_routed_experts": 0, "num_activated_experts": 2, "axes_dims_rope": (4, 6, 6), "max_resolution": (8, 8),
        "llama_layers": [0, 1, 0, 1], "force_inference_output": True, **options}))


def _inputs(dtype):
    draw = Draw(dtype)
    return {"hidden_states": draw(2, 4, 4, 6), "timesteps": draw.times(2, 1000, dtype=torch.float32),
            "encoder_hidden_states_t5": draw(2, 5, 20), "encoder_hidden_states_llama3": draw(2, 2, 3, 28),
            "pooled_embeds": draw(2, 12), "return_dict": False}


def _tables(tokens, height, width):
    ids = torch.zeros(1, tokens, 3)
    ids[0, : height * width, 1] = torch.arange(height).repeat_interleave(width)
    ids[0, : height * width, 2] = torch.arange(width).repeat(height)
    return HiDreamImageEmbedND(theta=10000, axes_dim=(64, 32, 32))(ids)


def _double(dtype):
    draw = Draw(dtype)
    block = randomise(HiDreamImageTransformerBlock(2560, 20, 128, num_routed_experts=0)).to(dtype)
    return block, (), {"hidden_states": draw(1, 256, 2560), "encoder_hidden_states": draw(1, 64, 2560),
                       "temb": draw(1, 2560), "image_rotary_emb": _tables(320, 16, 16)}


def _single(dtype):
    draw = Draw(dtype)
    block = randomise(HiDreamImageSingleTransformerBlock(2560, 20, 128, num_routed_experts=0)).to(dtype)
    return block, (), {"hidden_states": draw(1, 320, 2560), "temb": draw(1, 2560),
                       "image_rotary_emb": _tables(320, 16, 16)}


FAMILY = Family(
    name="hidream", title="HiDream-I1, diffusers", build=build, inputs=_inputs, blocks=4, time="timesteps",
    times=(1000.0, 0.0), wide={"double block, 256 + 64 tokens": _double, "single block, 256 + 64 tokens": _single})
