"""Stable Diffusion XL: UNet2DConditionModel with linear projections, deeper transformers, and sizes as conditions."""
import torch
from diffusers import UNet2DConditionModel

from benchmarks.families.family import Draw, Family, randomise
from benchmarks.families.unet import transformer


def _build():
    return randomise(UNet2DConditionModel(
        sample_size=6, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=2, norm_num_groups=8, use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 20))


def _inputs(dtype):
    draw = Draw(dtype)
    sizes = torch.tensor([[512, 512, 0, 0, 512, 512], [384, 512, 16, 0, 512, 256]], dtype=dtype)
    return {"sample": draw(2, 4, 6, 10), "encoder_hidden_states": draw(2, 7, 24), "timestep": draw.times(2, 1000.0),
            "added_cond_kwargs": {"text_embeds": draw(2, 20), "time_ids": sizes}, "return_dict": False}


FAMILY = Family(
    name="unet_xl", title="Stable Diffusion XL, diffusers", build=_build, inputs=_inputs, blocks=16,
    wide={"transformer block, 1024 + 77 tokens": transformer(10, 2048)}, sample="sample", times=(1000.0, 0.0))
