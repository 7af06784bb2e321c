"""qk_norm_rope in plain PyTorch: the specification. Computes in float32 at least, returns the inputs' dtype."""
import torch


def _normalise(x, weight, bias, norm, norm_scope, eps):
    """norm(x) * weight + bias of x [B,S,H,Dh], over Dh or over H*Dh."""
    shape = x.shape
    if norm_scope == "full":
        x = x.flatten(2)  # [B,S,H*Dh]
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.to(x.dtype)
    if bias is not None:
        x = x + bias.to(x.dtype)
    return x.reshape(shape)


def _rotate(x, cos, sin, rope):
    """Each of the first P pairs of a head turned by its angle."""
    P = cos.shape[-1]
    cos, sin = (t.to(x.dtype) if t.dim() == 4 else t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))  # [..,S,1 or H,P]
    if rope == "interleaved":
        a, b = x[..., 0 : 2 * P : 2], x[..., 1 : 2 * P : 2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = x[..., :P], x[..., P : 2 * P]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, x[..., 2 * P :]), -1)


def qk_norm_rope(*arguments):
    """(q, k, v) of all streams joined over the tokens; k or v None where the streams have none.

    arguments: the 9 fields of each stream, then norm, norm_scope, eps, rope.
    """
    *inputs, norm, norm_scope, eps, rope = arguments
    joined = [], [], []
    for i in range(0, len(inputs), 9):
        q, k, v, q_weight, k_weight, q_bias, k_bias, cos, sin = inputs[i : i + 9]
        for part, x, weight, bias in ((0, q, q_weight, q_bias), (1, k, k_weight, k_bias)):
            if x is None:
                continue
            y = _normalise(x.to(torch.promote_types(x.dtype, torch.float32)), weight, bias, norm, norm_scope, eps)
            y = y if cos is None else _rotate(y, cos, sin, rope)
            joined[part].append(y.to(x.dtype))
        if v is not None:
            joined[2].append(v)
    return tuple(torch.cat(parts, 1).contiguous() if parts else None for parts in joined)


qk_norm_rope_joint = qk_norm_rope
