"""The parts of a diffusion transformer. Names, and so state-dict keys, are those of facebookresearch/DiT."""
import math

import torch
from torch import nn

from difuse_kernels import attention_packed, gate_residual_norm_modulate, gelu_tanh, norm_modulate, patchify


def timestep_embedding(t, dim, max_period=10000):
    """Sinusoids of t [B] (any real dtype, may be fractional) -> float32 [B,dim]: cosines, then sines."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # [B,dim/2]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)  # [B,dim]


def sincos_2d(grid, dim):
    """Fixed position embedding of a grid x grid image, float32 [grid*grid,dim]: the column's half first, as in DiT."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)  # [grid,dim/2]
    return torch.cat((axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)), dim=1).float()


class PatchEmbed(nn.Module):
    """Image [B,C,H,W] -> tokens [B,S,D]. `proj` is DiT's patch convolution, flattened: [D,C,p,p] -> [D,C*p*p]."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * patch_size**2, hidden_size)

    def forward(self, x):
        return self.proj(patchify(x, self.patch_size, order="cpq"))  # [B,S,D]


class TimestepEmbedder(nn.Module):
    """t [B] -> [B,D]. The sinusoids are float32 whatever the weights are: bfloat16 cannot tell 999 from 1000."""

    def __init__(self, hidden_size, frequency_size=256):
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        embedding = timestep_embedding(t, self.frequency_size)  # [B,256] float32
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))  # [B,D]


class LabelEmbedder(nn.Module):
    """y [B] -> [B,D]. Row num_classes is the null class; in train() a label becomes null with probability dropout."""

    def __init__(self, num_classes, hidden_size, dropout):
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        if self.training and self.dropout > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout
            y = y.masked_fill(dropped, self.num_classes)  # [B]
        return self.embedding_table(y)  # [B,D]


class Attention(nn.Module):
    """Self-attention. q, k and v are views of one packed projection; nothing is transposed or copied."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, h):
        head_dim = h.shape[-1] // self.num_heads
        qkv = self.qkv(h).unflatten(-1, (3, self.num_heads, head_dim))  # [B,S,3,H,Dh]
        return self.proj(attention_packed(qkv).flatten(2))  # [B,S,D]


class GeluTanh(nn.GELU):
    """torch's, by our kernel where that is faster."""

    def __init__(self):
        super().__init__("tanh")

    def forward(self, x):
        return gelu_tanh(x)  # [...,F]


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, hidden_size, mlp_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.act = GeluTanh()
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, h):
        return self.fc2(self.act(self.fc1(h)))  # [B,S,D]


def add_norm_modulate(x, y, gate, scale, shift):
    """x' = x + gate * y and its modulated norm; y None means that there is nothing to add. Returns (x', h)."""
    if y is None:
        return x, norm_modulate(x, scale, shift)
    return gate_residual_norm_modulate(x, y, gate, scale, shift)


class DiTBlock(nn.Module):
    """adaLN-Zero block. Its last branch is not added here but by the next block, in one pass with that block's norm."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, y, gate, c):
        """x [B,S,D], still owed the branch gate [B,D] * y [B,S,D]; c [B,D]. Returns the same three, one block on."""
        modulation = self.adaLN_modulation(c)  # [B,6*D]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # each [B,D]
        x, h = add_norm_modulate(x, y, gate, scale_msa, shift_msa)  # [B,S,D]
        x, h = add_norm_modulate(x, self.attn(h), gate_msa, scale_mlp, shift_mlp)  # [B,S,D]
        return x, self.mlp(h), gate_mlp


class FinalLayer(nn.Module):
    """Adds the last branch, norms, modulates and projects every token to its patch, order (p, q, channel)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, y, gate, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # each [B,D]
        _, h = add_norm_modulate(x, y, gate, scale, shift)  # [B,S,D]
        return self.linear(h)  # [B,S,p*p*C']
