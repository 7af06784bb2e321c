"""Stable Diffusion 1.5: UNet2DConditionModel, with a text mask."""
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from benchmarks.families.family import Draw, Family, randomise


def _build():
    return randomise(UNet2DConditionModel(
        sample_size=6, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=2, norm_num_groups=8))


def _inputs(dtype):
    draw = Draw(dtype)
    return {"sample": draw(2, 4, 6, 10), "encoder_hidden_states": draw(2, 7, 24), "timestep": draw.times(2, 1000.0),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
            "return_dict": False}


def resnet(channels, size, batch=2, temb=1280, eps=1e-5):
    """A ResNet block as wide as a published model's; `size` positions squared."""
    def make(dtype):
        draw = Draw(dtype)
        block = randomise(ResnetBlock2D(in_channels=channels, temb_channels=temb, eps=eps)).to(dtype)
        return block, (), {"input_tensor": draw(batch, channels, size, size),
                           "temb": None if temb is None else draw(batch, temb)}
    return make


def transformer(heads, text_width):
    """A transformer block of width 640, 32 x 32 positions, and 77 tokens of text."""
    def make(dtype):
        draw = Draw(dtype)
        block = randomise(BasicTransformerBlock(640, heads, 640 // heads, cross_attention_dim=text_width)).to(dtype)
        return block, (), {"hidden_states": draw(1, 1024, 640), "encoder_hidden_states": draw(1, 77, text_width)}
    return make


FAMILY = Family(
    name="unet", title="Stable Diffusion 1.5, diffusers", build=_build, inputs=_inputs, blocks=12,
    wide={"ResNet block, 2 x 320 x 32 x 32": resnet(320, 32), "ResNet block, 2 x 640 x 16 x 16": resnet(640, 16),
          "transformer block, 1024 + 77 tokens": transformer(8, 768)},
    sample="sample", times=(1000.0, 0.0))
