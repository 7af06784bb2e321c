"""Wan 2.1 and 2.2: WanTransformer3DModel."""
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

from benchmarks.families.family import Draw, Family, randomise


def build(**options):
    """The small model; `options` of WanTransformer3DModel change it."""
    return randomise(WanTransformer3DModel(**{
        "patch_size": (1, 2, 2), "num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4,
        "out_channels": 4, "text_dim": 20, "freq_dim": 32, "ffn_dim": 72, "num_layers": 2, "rope_max_seq_len": 16,
        **options}))


def _inputs(dtype):
    draw = Draw(dtype)
    return {"hidden_states": draw(2, 4, 3, 6, 10), "timestep": draw.times(2, 1000, dtype=torch.float32),
            "encoder_hidden_states": draw(2, 7, 20), "return_dict": False}


def _wide(per_token):
    def make(dtype):
        draw = Draw(dtype)
        block = randomise(WanTransformerBlock(1536, 8960, 12, cross_attn_norm=True)).to(dtype)
        tables = WanRotaryPosEmbed(128, (1, 2, 2), 1024)(torch.empty(1, 16, 2, 32, 32))  # of 2 x 16 x 16 tokens
        temb = draw(1, 512, 6, 1536) if per_token else draw(1, 6, 1536)
        return block, (), {"hidden_states": draw(1, 512, 1536), "encoder_hidden_states": draw(1, 512, 1536),
                           "temb": temb, "rotary_emb": tables}
    return make


FAMILY = Family(
    name="wan", title="Wan 2.1 and 2.2, diffusers", build=build, inputs=_inputs, blocks=2, times=(1000.0, 0.0),
    wide={"block of 1.3B, 512 + 512 tokens": _wide(per_token=False),
          "block of 1.3B, 512 + 512 tokens, a timestep per token": _wide(per_token=True)})
