"""adaln in plain PyTorch: the specification of the three fused ops. Computes in float32 at least, returns x's dtype."""
import torch


def _rows(modulation, work):
    """[B,D] -> [B,1,D], so that it meets every token; [B,S,D] stays."""
    modulation = modulation.to(work)
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def norm_modulate(x, scale, shift, weight, bias, norm, eps):
    """norm(x) * (1 + scale) + shift, with norm(x) = LayerNorm or RMSNorm over the last dimension."""
    work = torch.promote_types(x.dtype, torch.float32)
    h = x.to(work)  # [B,S,D]
    if norm == "layer":
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * weight.to(work)
    if bias is not None:
        h = h + bias.to(work)
    if scale is not None:
        h = h * (1 + _rows(scale, work))
    if shift is not None:
        h = h + _rows(shift, work)
    return h.to(x.dtype)


def gate_residual(x, y, gate):
    """x + gate * y."""
    work = torch.promote_types(x.dtype, torch.float32)
    y = y.to(work)
    if gate is not None:
        y = _rows(gate, work) * y
    return (x.to(work) + y).to(x.dtype)


def gate_residual_norm_modulate(x, y, gate, scale, shift, weight, bias, norm, eps):
    """(x', norm_modulate(x')) with x' = x + gate * y, rounded to x's dtype before it is normalised."""
    x = gate_residual(x, y, gate)
    return x, norm_modulate(x, scale, shift, weight, bias, norm, eps)
