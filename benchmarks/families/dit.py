"""DiT in diffusers: DiTTransformer2DModel, every block with an embedder of its own (equal ones, as published)."""
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock

from benchmarks.families.family import Draw, Family, randomise


def _build():
    model = randomise(DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3, sample_size=6,
        num_embeds_ada_norm=10))
    first, *others = (block.norm1.emb for block in model.transformer_blocks)
    for emb in others:
        emb.load_state_dict(first.state_dict())
    return model


def _inputs(dtype):
    draw = Draw(dtype)
    return {"hidden_states": draw(2, 4, 6, 6), "timestep": draw.times(2, 1000.0), "class_labels": torch.tensor([3, 10]),
            "return_dict": False}


def _wide(batch, tokens):
    def make(dtype):
        draw = Draw(dtype)
        block = randomise(BasicTransformerBlock(
            1152, 16, 72, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, attention_bias=True,
            norm_type="ada_norm_zero", norm_elementwise_affine=False)).to(dtype)
        return block, (), {"hidden_states": draw(batch, tokens, 1152), "timestep": draw.times(batch, 1000.0),
                           "class_labels": torch.arange(batch) + 3}
    return make


FAMILY = Family(
    name="dit", title="DiT, diffusers", build=_build, inputs=_inputs, blocks=3,
    wide={"XL/2 block, 2 x 256 tokens": _wide(2, 256), "XL/2 block, 1024 tokens": _wide(1, 1024)},
    times=(1000.0, 0.0), channels=4)
