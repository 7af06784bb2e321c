"""PixArt-alpha: PixArtTransformer2DModel, with resolution and aspect ratio, captions padded and masked."""
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock

from benchmarks.families.family import Draw, Family, randomise


def _build():
    return randomise(PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=48, sample_size=6, caption_channels=24, use_additional_conditions=True,
        interpolation_scale=1))


def _inputs(dtype):
    draw = Draw(dtype)
    return {"hidden_states": draw(2, 4, 6, 6), "encoder_hidden_states": draw(2, 7, 24),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
            "timestep": draw.times(2, 1000.0), "return_dict": False,
            "added_cond_kwargs": {"resolution": torch.tensor([[512.0, 512.0], [256.0, 512.0]], dtype=dtype),
                                  "aspect_ratio": torch.tensor([[1.0], [0.5]], dtype=dtype)}}


def _wide(dtype):
    draw = Draw(dtype)
    block = randomise(BasicTransformerBlock(
        1152, 16, 72, cross_attention_dim=1152, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        attention_bias=True, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6)).to(dtype)
    mask = torch.zeros(1, 1, 120, dtype=dtype)
    mask[..., 77:] = -10000
    return block, (), {"hidden_states": draw(1, 1024, 1152), "encoder_hidden_states": draw(1, 120, 1152),
                       "encoder_attention_mask": mask, "timestep": draw(1, 6 * 1152)}


FAMILY = Family(
    name="pixart", title="PixArt-alpha, diffusers", build=_build, inputs=_inputs, blocks=3,
    wide={"block, 1024 + 120 tokens": _wide}, times=(1000.0, 0.0), channels=4)
