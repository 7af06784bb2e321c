"""Whole diffusers pipelines of tiny random parts, saved and loaded: the same images after accelerate.

Prompts enter as embeddings, so that no tokenizer's files are needed.
"""
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import difuse  # noqa: E402
from benchmarks.families import load  # noqa: E402
from benchmarks.families.family import randomise  # noqa: E402
from benchmarks.families.proofs import psnr  # noqa: E402


def vae(channels):
    return randomise(diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=16,
        shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2))


def rebuilt(name, **changes):
    """The family's small model with another configuration."""
    model = load(name).build()
    return randomise(type(model).from_config({**model.config, **changes}))


def dit():
    transformer = rebuilt("dit", num_embeds_ada_norm=1000)  # the pipeline's null class is 1000
    pipe = diffusers.DiTPipeline(transformer, vae(transformer.config.in_channels), diffusers.DDIMScheduler())
    return pipe, {"class_labels": [1, 2], "guidance_scale": 3.0}


def pixart():
    transformer = rebuilt("pixart", use_additional_conditions=False)  # which go with images of 1024 pixels only
    width = transformer.config.caption_channels
    pipe = diffusers.PixArtAlphaPipeline(None, None, vae(transformer.config.in_channels), transformer,
                                         diffusers.DPMSolverMultistepScheduler())
    return pipe, {"prompt_embeds": noise(2, 7, width), "negative_prompt_embeds": noise(2, 7, width, seed=1),
                  "prompt_attention_mask": masks(), "negative_prompt_attention_mask": masks(), "prompt": None,
                  "negative_prompt": None, "use_resolution_binning": False}


def sd3():
    transformer = load("sd3").build()
    config = transformer.config
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(), vae(config.in_channels), None, None, None, None, None,
        None)
    return pipe, {"prompt_embeds": noise(2, 7, config.joint_attention_dim),
                  "negative_prompt_embeds": noise(2, 7, config.joint_attention_dim, seed=1),
                  "pooled_prompt_embeds": noise(2, config.pooled_projection_dim),
                  "negative_pooled_prompt_embeds": noise(2, config.pooled_projection_dim, seed=2)}


def flux():
    transformer = load("flux").build()
    config = transformer.config
    pipe = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), vae(config.in_channels // 4), None, None,
                                  None, None, transformer)
    return pipe, {"prompt_embeds": noise(2, 7, config.joint_attention_dim),
                  "pooled_prompt_embeds": noise(2, config.pooled_projection_dim)}


def wan():
    transformer = load("wan").build()
    channels = transformer.config.in_channels
    decoder = randomise(diffusers.AutoencoderKLWan(base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                                   temperal_downsample=[False, True, True],
                                                   latents_mean=[0.0] * channels, latents_std=[1.0] * channels))
    pipe = diffusers.WanPipeline(None, None, decoder, diffusers.FlowMatchEulerDiscreteScheduler(), transformer)
    width = transformer.config.text_dim
    return pipe, {"prompt_embeds": noise(1, 7, width), "negative_prompt_embeds": noise(1, 7, width, seed=1),
                  "num_frames": 5}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masks():
    return torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


PIPELINES = {"DiTPipeline": dit, "PixArtAlphaPipeline": pixart, "StableDiffusion3Pipeline": sd3, "FluxPipeline": flux,
             "WanPipeline": wan}


def images(pipe, arguments, steps=4):
    """What the pipeline makes, as floats."""
    sizes = {} if isinstance(pipe, diffusers.DiTPipeline) else {"height": 32, "width": 32}
    result = pipe(**arguments, **sizes, num_inference_steps=steps, output_type="np",
                  generator=torch.Generator().manual_seed(3))
    found = result.frames if hasattr(result, "frames") else result.images
    return torch.as_tensor(found)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_saved_pipeline_makes_the_same_images(name, tmp_path):
    pipe, arguments = PIPELINES[name]()
    pipe.save_pretrained(tmp_path)
    missing = {key: None for key, part in pipe.components.items() if part is None}
    pipe = type(pipe).from_pretrained(tmp_path, **missing)
    pipe.set_progress_bar_config(disable=True)
    before = images(pipe, arguments)
    report = difuse.accelerate(pipe.transformer)
    assert report.blocks[0] == report.blocks[1] > 0
    after = images(pipe, arguments)
    assert before.std() > 0.01 and psnr(after, before) >= 60
    pipe.save_pretrained(tmp_path / "again")
    again = type(pipe).from_pretrained(tmp_path / "again", **missing)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(images(again, arguments), before)
    difuse.restore(pipe.transformer)
    assert torch.equal(images(pipe, arguments), before)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_frozen_transformer_takes_the_models_place(name):
    pipe, arguments = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    before, transformer = images(pipe, arguments), pipe.transformer
    pipe.transformer = difuse.freeze(transformer)
    pipe.to("cpu")
    after = images(pipe, arguments)
    assert psnr(after, before) >= 60 and not torch.equal(after, before)
    pipe.transformer = transformer
    assert torch.equal(images(pipe, arguments), before)


def test_a_hoisted_transformer_too():
    pipe, arguments = dit()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    before, transformer = images(pipe, arguments), pipe.transformer
    pipe.scheduler.set_timesteps(4)
    pipe.transformer = difuse.freeze(transformer).hoist(pipe.scheduler.timesteps, [1, 2, 1000])
    assert psnr(images(pipe, arguments), before) >= 60
    with pytest.raises(ValueError, match="is none of the 4 that were hoisted"):
        images(pipe, arguments, steps=5)
