"""group_norm_act in plain PyTorch: the specification. Computes in float32 at least, returns x's dtype and format."""
import torch


def group_norm_act(x, add, weight, bias, groups, activation, eps):
    """act((u - mean) * rstd * weight + bias), u = x + add."""
    work = torch.promote_types(x.dtype, torch.float32)
    positions = (1,) * (x.dim() - 2)
    u = x.to(work)  # [B,C,*spatial]
    if add is not None:
        u = u + add.to(work).reshape(*add.shape, *positions)
    u = u.unflatten(1, (groups, -1))  # [B,G,C/G,*spatial]
    within = tuple(range(2, u.dim()))
    u = u - u.mean(within, keepdim=True)
    h = (u * torch.rsqrt(u.square().mean(within, keepdim=True) + eps)).flatten(1, 2)  # [B,C,*spatial]
    if weight is not None:
        h = h * weight.to(work).reshape(-1, *positions)
    if bias is not None:
        h = h + bias.to(work).reshape(-1, *positions)
    if activation == "silu":
        h = h * torch.sigmoid(h)  # F.silu's derivative has other bits where a second one may be asked for
    return h.to(x.dtype)
