"""The autoencoder of Stable Diffusion: AutoencoderKL, encoding and decoding."""
from diffusers import AutoencoderKL

from benchmarks.families.family import Draw, Family, randomise
from benchmarks.families.unet import resnet


def _build():
    model = randomise(AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), norm_num_groups=8, sample_size=12))
    for half in (model.encoder, model.decoder):  # the softmax ignores it: its gradient would be rounding errors alone
        half.mid_block.attentions[0].to_k.bias.requires_grad_(False)
    return model


def _inputs(dtype):
    return {"sample": Draw(dtype)(2, 3, 12, 8), "return_dict": False}


FAMILY = Family(
    name="vae", title="Stable Diffusion's autoencoder, diffusers", build=_build, inputs=_inputs, blocks=10,
    left_alone=2, wide={"ResNet block, 1 x 128 x 64 x 64": resnet(128, 64, batch=1, temb=None, eps=1e-6)},
    sample="sample", time=None)
