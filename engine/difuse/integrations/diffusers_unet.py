"""UNets and autoencoders of images (diffusers UNet2DConditionModel, AutoencoderKL): ResNet blocks, group norms.

Their transformer blocks and attentions are other families', too: diffusers_basic_block.py, diffusers_attention.py.
"""
import torch
from torch import nn
from torch._prims_common import suggest_memory_format

from difuse.integrations.parts import watched
from difuse.integrations.registry import register
from difuse_kernels import group_norm_act


def _normed(norm, x, add=None, activation="none"):
    """act(norm(x + add)); x [B,C,H,W], add [B,C]. In the memory format that eager's norm chooses."""
    x = x.contiguous(memory_format=suggest_memory_format(x))
    return group_norm_act(x, norm.num_groups, norm.weight, norm.bias, add=add, activation=activation, eps=norm.eps)


@register("torch.nn.modules.normalization.GroupNorm", ops=("group_norm_act",), kind="layer")
def group_norm(self, input):
    """input [B,C,*]; nn.GroupNorm: before a transformer, at the end of a model."""
    autocast = not input.is_cpu and torch.is_autocast_enabled(input.device.type)  # returns float32, but on the CPU
    if autocast or not 3 <= input.dim() <= 5:
        return type(self).forward(self, input)
    return _normed(self, input)


def _not_this_resnet(block):
    norms = [norm for norm in (block.norm1, block.norm2) if type(norm) is not nn.GroupNorm]
    if norms:
        return f"one of its norms is {norms[0]}; expected GroupNorm"
    if type(block.nonlinearity) is not nn.SiLU:
        return f"its activation is {block.nonlinearity}; expected SiLU"
    return None


@register("diffusers.models.resnet.ResnetBlock2D", refuses=_not_this_resnet, ops=("group_norm_act",))
def resnet_block(self, input_tensor, temb, *args, **kwargs):
    """x [B,C,H,W] and, where the block has a projection of it, temb [B,E] -> [B,C2,H2,W2]."""
    x = input_tensor
    if (args or kwargs or (temb is None) != (self.time_emb_proj is None)
            or (temb is None and self.time_embedding_norm == "scale_shift")
            or watched(self.norm1, self.norm2, self.nonlinearity)):
        return type(self).forward(self, input_tensor, temb, *args, **kwargs)
    h = _normed(self.norm1, x, activation="silu")  # [B,C,H,W]
    resample = self.downsample if self.upsample is None else self.upsample
    if resample is not None:
        if self.upsample is not None and x.shape[0] >= 64:
            x, h = x.contiguous(), h.contiguous()  # as eager, which so avoids a limit of its kernel
        x, h = resample(x), resample(h)  # [B,C,H2,W2]
    h = self.conv1(h)  # [B,C2,H2,W2]
    add = None
    if temb is not None:
        add = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))  # [B,C2], or scale and shift
    if self.time_embedding_norm == "scale_shift":
        scale, shift = add[:, :, None, None].chunk(2, dim=1)  # each [B,C2,1,1]
        h = self.nonlinearity(torch.addcmul(shift, _normed(self.norm2, h), 1 + scale))  # [B,C2,H2,W2]
    else:
        h = _normed(self.norm2, h, add, "silu")  # [B,C2,H2,W2]
    h = self.conv2(self.dropout(h))  # [B,C2,H2,W2]
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x.contiguous() if self.training else x)  # [B,C2,H2,W2], contiguous as in eager
    x = x + h
    return x if self.output_scale_factor == 1 else x / self.output_scale_factor
