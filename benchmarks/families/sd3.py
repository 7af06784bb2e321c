"""Stable Diffusion 3.5: SD3Transformer2DModel with query and key norms and dual attention."""
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock

from benchmarks.families.family import Draw, Family, randomise


def build(**options):
    """The small model: a dual block, a plain one, and the last, whose text ends."""
    options = {"dual_attention_layers": (0,), "qk_norm": "rms_norm", **options}
    return randomise(SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=3, joint_attention_dim=24, caption_projection_dim=48, pooled_projection_dim=20,
        pos_embed_max_size=8, **options))


def _inputs(dtype):
    draw = Draw(dtype)
    return {"hidden_states": draw(2, 4, 10, 6), "encoder_hidden_states": draw(2, 7, 24),
            "pooled_projections": draw(2, 20), "timestep": draw.times(2, 1000), "return_dict": False}


def _wide(dual):
    def make(dtype):
        draw = Draw(dtype)
        block = randomise(JointTransformerBlock(1536, 24, 64, qk_norm="rms_norm", use_dual_attention=dual)).to(dtype)
        return block, (), {"hidden_states": draw(1, 1024, 1536), "encoder_hidden_states": draw(1, 154, 1536),
                           "temb": draw(1, 1536)}
    return make


FAMILY = Family(
    name="sd3", title="Stable Diffusion 3.5, diffusers", build=build, inputs=_inputs, blocks=3, times=(1000.0, 0.0),
    wide={"dual block, 1024 + 154 tokens": _wide(True), "block, 1024 + 154 tokens": _wide(False)})
