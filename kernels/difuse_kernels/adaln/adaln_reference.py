"""adaln in plain PyTorch: the specification of the fused ops. Computes in float32 at least, returns x's dtype."""
import torch


def _rows(modulation, table, work):
    """The modulation plus its table [D]; [B,D] -> [B,1,D], so that it meets every token; [B,S,D] stays."""
    modulation = modulation.to(work) if table is None else modulation.to(work) + table.to(work)
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def norm_modulate(x, scale, shift, weight, bias, scale_table, shift_table, norm, eps):
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
        h = h * (1 + _rows(scale, scale_table, work))
    if shift is not None:
        h = h + _rows(shift, shift_table, work)
    return h.to(x.dtype)


def gate_residual(x, y, gate, gate_table):
    """x + gate * y."""
    work = torch.promote_types(x.dtype, torch.float32)
    y = y.to(work)
    if gate is not None:
        y = _rows(gate, gate_table, work) * y
    return (x.to(work) + y).to(x.dtype)


def gate_residual_norm_modulate(x, y, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, norm,
                                eps):
    """(x', norm_modulate(x')) with x' = x + gate * y, rounded to x's dtype before it is normalised."""
    x = gate_residual(x, y, gate, gate_table)
    return x, norm_modulate(x, scale, shift, weight, bias, scale_table, shift_table, norm, eps)


def norm_modulate_dual(x, scale, shift, scale2, shift2, norm, eps):
    """One norm, modulated twice."""
    return tuple(norm_modulate(x, *rows, None, None, None, None, norm, eps)
                 for rows in ((scale, shift), (scale2, shift2)))
