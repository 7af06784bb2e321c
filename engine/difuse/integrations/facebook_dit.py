"""facebookresearch's DiT, fast-DiT and SiT. Their classes live in no package: modules are recognised by their parts.

Parts do not prove what a forward does with them (a descendant may rotate queries in the same attention). So every
module's own forward is tried on a twin that has its class and attributes but small random parts, against the formulas
of the paper (Peebles & Xie 2023, arXiv:2212.09748) below: in float64, in eval and train mode, 4 to 289 tokens. The
model's own weights would prove less, adaLN-Zero starts with gates of zero; and nobody's hook fires on a twin. What a
trial cannot see: a forward that branches on dtype, device, gradient mode, or on lengths other than those tried.
"""
import torch
import torch.nn.functional as F
from torch import nn

from difuse.integrations.parts import plain_norm, rows, watched
from difuse.integrations.registry import own_class, register
from difuse_kernels import attention_packed, gate_residual, gate_residual_norm_modulate, norm_modulate

_BLOCK = {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}
_FINAL = {"norm_final", "linear", "adaLN_modulation"}
_ATTENTION, _NORMS_OR_DROPOUTS = {"qkv", "proj"}, {"q_norm", "k_norm", "norm", "attn_drop", "proj_drop"}
_HEADS, _HEAD_DIM = 2, 3  # of a twin
_WIDTH = _HEADS * _HEAD_DIM


def _modulate(h, shift, scale):
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _paper_block(block, x, c):
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate_msa.unsqueeze(1) * block.attn(_modulate(block.norm1(x), shift_msa, scale_msa))  # [B,S,D]
    return x + gate_mlp.unsqueeze(1) * block.mlp(_modulate(block.norm2(x), shift_mlp, scale_mlp))  # [B,S,D]


def _paper_final(layer, x, c):
    shift, scale = layer.adaLN_modulation(c).chunk(2, dim=1)
    return layer.linear(_modulate(layer.norm_final(x), shift, scale))  # [B,S,p*p*C]


def _paper_attention(attn, x):
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B,H,S,Dh]
    return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # [B,S,D]


class _Mixes(nn.Module):
    """Stands for an attention or an MLP: mixes channels and tokens."""

    def __init__(self):
        super().__init__()
        self.linear = _linear(_WIDTH)

    def forward(self, x):
        return self.linear(x) + x.cumsum(1).sin()


def _linear(width):
    return nn.Linear(_WIDTH, width, dtype=torch.float64, device="cpu")


def _modulation(chunks):
    return nn.Sequential(nn.SiLU(), _linear(chunks * _WIDTH))


def _computes_something_else(module, paper, inputs, parts, **attributes):
    """Why this module's own forward is not the function `paper` of x [B,S,D] and so many rows [B,D]; or None."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would seed GPUs as well
        children = parts()
        children |= {name: nn.Identity() for name in module._modules if name not in children}
        twin = object.__new__(own_class(module))
        for training, tokens in ((False, 4), (False, 5), (False, 64), (False, 289), (True, 4), (True, 5)):
            vars(twin).update({**vars(module), "_parameters": {}, "_buffers": {}, "_modules": dict(children),
                               "training": training, **attributes})
            x, *others = (30 * torch.randn(shape, dtype=torch.float64, device="cpu")  # large enough to meet a clamp
                          for shape in [(2, tokens, _WIDTH)] + [(2, _WIDTH)] * (inputs - 1))
            expected = paper(twin, x, *others)
            try:
                found = type(module).forward(twin, x.clone(), *(other.clone() for other in others))
            except Exception as error:  # of unknown code: whatever it is, it is no such forward
                return f"its forward computes something else: on small inputs it raises {type(error).__name__}: {error}"
            if not isinstance(found, torch.Tensor) or found.dtype != x.dtype or found.shape != expected.shape:
                return "its forward computes something else: what it returns differs in type, dtype or shape"
            if not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
                mode = "train" if training else "eval"
                return (f"its forward computes something else: on small inputs in {mode} mode it differs by "
                        f"{(found - expected).abs().max():.2g}")
    return None


def _has(module, least, most=frozenset()):
    names = module._modules.keys()
    return (names >= least and names <= least | most and not module._parameters and not module._buffers
            and not type(module).__module__.startswith("difuse."))


def _norm(norm):
    return nn.LayerNorm(_WIDTH, eps=norm.eps, elementwise_affine=False, dtype=torch.float64, device="cpu")


def _not_this_block(block):
    return plain_norm(block, "norm1", "norm2") or _computes_something_else(block, _paper_block, 2, lambda: {
        "norm1": _norm(block.norm1), "attn": _Mixes(), "norm2": _norm(block.norm2), "mlp": _Mixes(),
        "adaLN_modulation": _modulation(6)})


@register("facebookresearch.DiTBlock", matches=lambda module: _has(module, _BLOCK), refuses=_not_this_block,
          ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"))
def dit_block(self, x, c, *args, **kwargs):
    """x [B,S,D], c [B,D] -> [B,S,D]. DiTBlock and SiTBlock."""
    if args or kwargs or watched(self.norm1, self.norm2):
        return type(self).forward(self, x, c, *args, **kwargs)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows(self.adaLN_modulation(c), x).chunk(6, dim=1)
    x = x.contiguous()  # [B,S,D]; a patch embedding's convolution leaves the channels strided
    attended = self.attn(norm_modulate(x, scale_msa, shift_msa, eps=self.norm1.eps))  # [B,S,D]
    x, h = gate_residual_norm_modulate(x, attended, gate_msa, scale_mlp, shift_mlp, eps=self.norm2.eps)  # [B,S,D]
    return gate_residual(x, self.mlp(h), gate_mlp)  # [B,S,D]


def _not_this_final_layer(layer):
    return plain_norm(layer, "norm_final") or _computes_something_else(layer, _paper_final, 2, lambda: {
        "norm_final": _norm(layer.norm_final), "linear": _Mixes(), "adaLN_modulation": _modulation(2)})


@register("facebookresearch.FinalLayer", matches=lambda module: _has(module, _FINAL), refuses=_not_this_final_layer,
          ops=("norm_modulate",), kind="part")
def final_layer(self, x, c, *args, **kwargs):
    """x [B,S,D], c [B,D] -> [B,S,p*p*C]."""
    if args or kwargs or watched(self.norm_final):
        return type(self).forward(self, x, c, *args, **kwargs)
    shift, scale = rows(self.adaLN_modulation(c), x).chunk(2, dim=1)  # [B,D]
    return self.linear(norm_modulate(x.contiguous(), scale, shift, eps=self.norm_final.eps))  # [B,S,p*p*C]


def _bypassed(attn):
    return [attn._modules[name] for name in ("q_norm", "k_norm", "norm", "attn_drop") if attn._modules.get(name)]


def _not_this_attention(attn):
    for name in ("q_norm", "k_norm", "norm"):
        if type(attn._modules.get(name, nn.Identity())) is not nn.Identity:
            return f"{name} is {attn._modules[name]}; expected none"
    head_dim, rest = divmod(attn.proj.in_features, attn.num_heads)
    if rest or attn.qkv.out_features != 3 * attn.proj.in_features or head_dim % 8 or head_dim > 256:
        return (f"its {attn.num_heads} heads get {attn.qkv.out_features} of qkv; expected three times a multiple of 8 "
                "up to 256 each")
    if abs(getattr(attn, "scale", head_dim**-0.5) - head_dim**-0.5) > 1e-6:
        return f"its scale is {attn.scale}; expected head_dim**-0.5"
    sizes = {"num_heads": _HEADS, "head_dim": _HEAD_DIM, "scale": _HEAD_DIM**-0.5, "attn_dim": _WIDTH, "dim": _WIDTH}
    return _computes_something_else(
        attn, _paper_attention, 1, lambda: {"qkv": _linear(3 * _WIDTH), "proj": _linear(_WIDTH)} | {
            name: nn.Dropout(0.0) for name in ("attn_drop", "proj_drop") if name in attn._modules},
        **{name: value for name, value in sizes.items() if name in vars(attn)})


@register("facebookresearch.Attention", refuses=_not_this_attention, ops=("attention_packed",), kind="part",
          matches=lambda module: _has(module, _ATTENTION, _NORMS_OR_DROPOUTS) and hasattr(module, "num_heads"))
def attention(self, x, *args, **kwargs):
    """x [B,S,D] -> [B,S,D]; the Attention of timm, all versions."""
    dropout = self._modules.get("attn_drop")
    if args or kwargs or watched(*_bypassed(self)) or (dropout is not None and dropout.training and dropout.p > 0):
        return type(self).forward(self, x, *args, **kwargs)
    qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B,S,3,H,Dh]
    out = self.proj(attention_packed(qkv).flatten(2))  # [B,S,D]
    return self.proj_drop(out) if "proj_drop" in self._modules else out
