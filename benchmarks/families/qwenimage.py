"""Qwen-Image: QwenImageTransformer2DModel, with texts of different lengths."""
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformerBlock

from benchmarks.families.family import Draw, Family, randomise


def build(**options):
    """The small model."""
    return randomise(QwenImageTransformer2DModel(
        patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6), **options))


def _mask(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [B,T]


def _inputs(dtype):
    draw = Draw(dtype)
    return {"hidden_states": draw(2, 15, 8), "encoder_hidden_states": draw(2, 7, 24),
            "encoder_hidden_states_mask": _mask(7, 3), "timestep": draw.times(2), "img_shapes": [[(1, 5, 3)]] * 2,
            "return_dict": False}


def _wide(dtype):
    draw = Draw(dtype)
    block = randomise(QwenImageTransformerBlock(3072, 24, 128)).to(dtype)
    rotary = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)([(1, 16, 16)], max_txt_seq_len=64)
    return block, (), {"hidden_states": draw(1, 256, 3072), "encoder_hidden_states": draw(1, 64, 3072),
                       "encoder_hidden_states_mask": torch.ones(1, 64, dtype=torch.bool), "temb": draw(1, 3072),
                       "image_rotary_emb": rotary}


FAMILY = Family(
    name="qwenimage", title="Qwen-Image, diffusers", build=build, inputs=_inputs, blocks=2,
    wide={"block, 256 + 64 tokens": _wide})
