"""What a user would write today for each op: the rival of the benchmarks and the yardstick of the error budget."""
import torch
import torch.nn.functional as F

from difuse_kernels.patchify.patchify_reference import patchify, unpatchify  # eager is the reshape itself


def _row(modulation):
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def norm_modulate(x, scale=None, shift=None, *, norm="layer", weight=None, bias=None, eps=1e-6):
    """F.layer_norm or F.rms_norm, then modulate(), as in facebookresearch/DiT."""
    D = x.shape[-1:]
    weight = None if weight is None else weight.to(x.dtype)
    if norm == "layer":
        h = F.layer_norm(x, D, weight, None if bias is None else bias.to(x.dtype), eps)
    else:
        h = F.rms_norm(x, D, weight, eps)
        h = h if bias is None else h + bias
    if scale is not None:
        h = h * (1 + _row(scale))
    if shift is not None:
        h = h + _row(shift)
    return h.to(x.dtype)


def gate_residual(x, y, gate=None):
    """x + gate * y in the dtype that promotion gives."""
    return (x + (y if gate is None else _row(gate) * y)).to(x.dtype)


def gate_residual_norm_modulate(x, y, gate=None, scale=None, shift=None, *, norm="layer", weight=None, bias=None,
                                eps=1e-6):
    """The two above, one after the other."""
    x = gate_residual(x, y, gate)
    return x, norm_modulate(x, scale, shift, norm=norm, weight=weight, bias=bias, eps=eps)


def attention(q, k, v, *, scale=None, kv_lengths=None, key_bias=None):
    """F.scaled_dot_product_attention with its transposes; masks become a dense bias."""
    mask = None
    if kv_lengths is not None or key_bias is not None:
        mask = torch.zeros(k.shape[0], 1, 1, k.shape[1], dtype=q.dtype, device=q.device)
        if key_bias is not None:
            mask = mask + key_bias[:, None, None, :]
        if kv_lengths is not None:
            hidden = torch.arange(k.shape[1], device=q.device) >= kv_lengths[:, None]
            mask = mask.masked_fill(hidden[:, None, None, :], float("-inf"))
        mask = mask.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous()


def sampler_step(inputs, coefficients, *, out_dtypes=None):
    """A sum of scaled tensors, one elementwise op after another, in the inputs' dtypes."""
    rows = coefficients.unsqueeze(0) if coefficients.dim() == 2 else coefficients
    tail = (1,) * (inputs[0].dim() - 1)
    outputs = []
    for i in range(rows.shape[1]):
        total = 0
        for j, tensor in enumerate(inputs):
            total = total + rows[:, i, j].reshape(-1, *tail) * tensor
        outputs.append(total.to(out_dtypes[i] if out_dtypes else inputs[0].dtype))
    return tuple(outputs)


EAGER = {f.__name__: f for f in (norm_modulate, gate_residual, gate_residual_norm_modulate, attention, patchify,
                                 unpatchify, sampler_step)}
