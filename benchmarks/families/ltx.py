"""LTX-Video: LTXVideoTransformer3DModel."""
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed, LTXVideoTransformerBlock

from benchmarks.families.family import Draw, Family, randomise

_SCALE = (20 / 25, 32, 32)  # of the rotary positions, as the pipeline passes it


def build(**options):
    """The small model, of 40 dimensions (not a multiple of 6); `options` of LTXVideoTransformer3DModel change it."""
    return randomise(LTXVideoTransformer3DModel(**{
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 5, "attention_head_dim": 8,
        "cross_attention_dim": 40, "num_layers": 2, "caption_channels": 20, **options}))


def _inputs(dtype):
    draw = Draw(dtype)
    mask = torch.ones(2, 9)
    mask[0, 4:] = 0
    return {"hidden_states": draw(2, 2 * 3 * 5, 8), "encoder_hidden_states": draw(2, 9, 20),
            "timestep": draw.times(2, 1000, dtype=torch.float32), "encoder_attention_mask": mask.to(dtype),
            "num_frames": 2, "height": 3, "width": 5, "rope_interpolation_scale": _SCALE, "return_dict": False}


def _wide(dtype):
    draw = Draw(dtype)
    block = randomise(LTXVideoTransformerBlock(2048, 32, 64, cross_attention_dim=2048)).to(dtype)
    tables = LTXVideoRotaryPosEmbed(2048)(torch.empty(1, 512, 2048), 2, 16, 16, _SCALE)
    mask = torch.zeros(1, 1, 128)
    mask[..., 100:] = -10000
    return block, (), {"hidden_states": draw(1, 512, 2048), "encoder_hidden_states": draw(1, 128, 2048),
                       "temb": draw(1, 1, 6 * 2048), "image_rotary_emb": tables,
                       "encoder_attention_mask": mask.to(dtype)}


FAMILY = Family(
    name="ltx", title="LTX-Video, diffusers", build=build, inputs=_inputs, blocks=2, times=(1000.0, 0.0),
    wide={"block of 2B, 512 + 128 tokens": _wide})
