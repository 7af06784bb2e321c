"""DiT and fast-DiT as facebookresearch publishes them, rewritten: names, structure and maths of the original.

One liberty: sinusoids are cast to the embedder's dtype, without which the original runs in float32 only.
"""
import math

import torch
from torch import nn

from benchmarks.families.family import Draw, Family, randomise


class Attention(nn.Module):
    """timm's, with its parts."""

    def __init__(self, dim, num_heads, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, dim // num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # [3,B,H,S,Dh]
        q, k = self.q_norm(qkv[0]), self.k_norm(qkv[1])
        dropout = self.attn_drop.p if self.training else 0.0
        out = nn.functional.scaled_dot_product_attention(q, k, qkv[2], dropout_p=dropout)  # [B,H,S,Dh]
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))  # [B,S,D]


class Mlp(nn.Module):
    """timm's, with its parts."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act = nn.Linear(dim, hidden), nn.GELU(approximate="tanh")
        self.drop1, self.norm = nn.Dropout(0.0), nn.Identity()
        self.fc2, self.drop2 = nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))  # [B,S,D]


def modulate(h, shift, scale):
    """h [B,S,D], one shift and scale [B,D] per sample."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)  # [B,S,D]


def _norm(dim):
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def _modulation(dim, chunks):
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, chunks * dim))


class DiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, **attention):
        super().__init__()
        self.norm1 = _norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, **attention)
        self.norm2 = _norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = _modulation(hidden_size, 6)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # each [B,D]
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))  # [B,S,D]
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))  # [B,S,D]


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = _norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = _modulation(hidden_size, 2)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # each [B,D]
        return self.linear(modulate(self.norm_final(x), shift, scale))  # [B,S,p*p*C]


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # [B,S,D]


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.half = frequencies // 2

    def forward(self, t):
        omega = torch.exp(-math.log(10000) / self.half * torch.arange(self.half, dtype=torch.float32, device=t.device))
        angles = t.float()[:, None] * omega  # [B,128]
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.mlp[0].weight.dtype))  # [B,D]


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, labels, train):
        if train:
            labels = labels.masked_fill(torch.rand(labels.shape[0]) < self.dropout_prob, self.num_classes)
        return self.embedding_table(labels)  # [B,D]


class DiT(nn.Module):
    """x [B,C,H,W], t [B], y [B] -> [B,2*C,H,W] with learn_sigma: the noise and its variance."""

    block = DiTBlock

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):
        super().__init__()
        self.learn_sigma, self.patch_size, self.grid = learn_sigma, patch_size, input_size // patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(self.block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed  # [B,S,D]
        c = self.t_embedder(t) + self.y_embedder(y, self.training)  # [B,D]
        for block in self.blocks:
            x = block(x, c)  # [B,S,D]
        x = self.final_layer(x, c)  # [B,S,p*p*C]
        x = x.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, (self.grid, self.grid))
        return torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)  # [B,C,H,W]


def build(model=DiT):
    """The small model."""
    return randomise(model(input_size=6, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=3,
                           num_classes=10))


def inputs(dtype, scale=1000.0):
    """What the small model takes, timesteps within 0 and `scale`."""
    draw = Draw(dtype)
    return {"x": draw(2, 4, 6, 6), "t": draw.times(2, scale), "y": torch.tensor([3, 10])}


def wide(cls, batch, tokens):
    """A block of the XL models on so many tokens."""
    def make(dtype):
        draw = Draw(dtype)
        return randomise(cls(1152, 16)).to(dtype), (), {"x": draw(batch, tokens, 1152), "c": draw(batch, 1152)}
    return make


FAMILY = Family(
    name="facebook_dit", title="DiT, facebookresearch (and fast-DiT)", build=build, inputs=inputs, blocks=3,
    wide={"XL/2 block, 2 x 256 tokens": wide(DiTBlock, 2, 256), "XL/2 block, 1024 tokens": wide(DiTBlock, 1, 1024)},
    sample="x", time="t", times=(1000.0, 0.0), channels=4, lora=("qkv", "fc1"))
