"""What difuse is measured against: eager PyTorch as users write it, and torch.compile of exactly that."""
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from difuse_kernels.testing.eager import EAGER


def op_rival(case, args, kwargs):
    """(function, arguments): the case in eager PyTorch, ready to be compiled."""
    if case.op == "sampler_step" and len(args[0]) == 3 and args[1].shape == (1, 3):
        return ddim_with_guidance(args[1], kwargs.get("out_dtypes")), args[0]
    eager = EAGER[case.op]
    return lambda *tensors: eager(*tensors, **kwargs), args


def ddim_with_guidance(coefficients, out_dtypes=None):
    """The update as users write it, f(x, m_cond, m_uncond) -> (x',), equal to the three given coefficients.

    Any alpha and sigma of today's noise level will do: guidance and the next level's follow from the coefficients.
    """
    of_x, of_cond, of_uncond = coefficients.double().flatten().tolist()
    alpha, sigma = 0.8, 0.6
    alpha_next = of_x * alpha
    sigma_next = of_cond + of_uncond + of_x * sigma
    w = of_cond / (of_cond + of_uncond)

    def step(x, m_cond, m_uncond):
        m = m_uncond + w * (m_cond - m_uncond)
        x0 = (x - sigma * m) / alpha
        x = alpha_next * x0 + sigma_next * m
        return (x.to(out_dtypes[0]) if out_dtypes else x,)

    return step


def compiled(function, **options):
    """torch.compile for one set of shapes, in its default mode unless `options` say otherwise; starts afresh."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, **options)


def first_call(function):
    """(result, seconds, why): the call that compiles. `why` says what stopped the compiler, result is then None."""
    began = time.perf_counter()
    try:
        result = function()
    except RuntimeError as error:  # what Dynamo, Inductor and its C++ compiler raise; the table shows it
        return None, None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return result, time.perf_counter() - began, None


def difference(ours, theirs):
    """The largest rms difference of matching tensors, relative to the rms of `theirs`."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True) if b.numel()]
    return max(((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30)).item() for a, b in pairs)


# Far above rounding, far below another formula: a rival beyond it computes something else.
SAME_RESULT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def check_rival(name, result, expected, dtype):
    """Raise RuntimeError if a rival's outputs are not those of the case: beating it would mean nothing."""
    off = difference(result, expected)
    if not off <= SAME_RESULT[dtype]:
        raise RuntimeError(f"rival {name}: its result differs by {off:.1e} (relative rms); expected at most "
                           f"{SAME_RESULT[dtype]:g} in {dtype}. Correct the rival")


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainAttention(nn.Module):
    """Self-attention as timm writes it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, S, D = x.shape
        q, k, v = self.qkv(x).reshape(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)  # [B,H,S,Dh]
        return self.proj(x.transpose(1, 2).reshape(B, S, D))  # [B,S,D]


class PlainBlock(nn.Module):
    """adaLN-Zero block as facebookresearch/DiT writes it."""

    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = PlainAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, int(dim * mlp_ratio)))
        self.mlp.add_module("act", nn.GELU(approximate="tanh"))
        self.mlp.add_module("fc2", nn.Linear(int(dim * mlp_ratio), dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # [B,S,D]


class PlainDiT(nn.Module):
    """DiT in plain PyTorch, the whole of facebookresearch/DiT's forward pass, without label dropout."""

    def __init__(self, config):
        super().__init__()
        D, p, C = config["hidden_size"], config["patch_size"], config["in_channels"]
        self.patch, self.num_classes = p, config["num_classes"]
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(C, D, p, stride=p)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(config["num_classes"] + 1, D)
        self.register_buffer("pos_embed", torch.zeros(1, (config["input_size"] // p) ** 2, D))
        self.blocks = nn.ModuleList(PlainBlock(D, config["num_heads"], config["mlp_ratio"])
                                    for _ in range(config["depth"]))
        self.final_layer = nn.Module()
        self.final_layer.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.final_layer.linear = nn.Linear(D, p * p * C * (2 if config["learn_sigma"] else 1))
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    @classmethod
    def like(cls, model):
        """The plain twin of a difuse DiT: the same weights, its patch projection a convolution again."""
        config, weights = model.config, dict(model.state_dict())
        shape = (-1, config["in_channels"], config["patch_size"], config["patch_size"])
        weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].reshape(shape)
        first = next(model.parameters())
        with first.device:
            twin = cls(config).to(first.dtype)
        twin.load_state_dict(weights)
        return twin.train(model.training)

    def forward(self, x, t, y):
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed  # [B,S,D]
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10000) * steps / 128)
        angles = t[:, None].float() * frequencies[None]
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.t_embedder.mlp[0].weight.dtype)
        c = self.t_embedder.mlp(embedding) + self.y_embedder.embedding_table(y)  # [B,D]
        for block in self.blocks:
            x = block(x, c)  # [B,S,D]
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        x = self.final_layer.linear(modulate(self.final_layer.norm_final(x), shift, scale))  # [B,S,p*p*C]
        grid, p = math.isqrt(x.shape[1]), self.patch
        x = x.reshape(len(x), grid, grid, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, grid * p, grid * p)  # [B,C,H,W]
