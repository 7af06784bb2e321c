"""packed_linear in plain PyTorch: the specification."""
import torch
import torch.nn.functional as F


def quantize(x, smooth=None):
    """(codes, scale) of x [...,K] smooth."""
    v = x if smooth is None else x * smooth  # [...,K]
    largest = v.abs().amax(-1)  # [...]
    largest = torch.where(largest > 1e-35, largest, 0)
    steps = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)  # 127 / x is 127 * (1 / x) in torch
    scale = torch.where(v.isfinite().all(-1), largest / 127, torch.nan)
    codes = (v.nan_to_num().double() * steps[..., None]).round()  # kernels round but once
    return codes.add(128).clamp(0, 255).to(torch.uint8), scale


def _per_sample(modulation, x):
    """[B,N] as [B,1,...,N], with as many dimensions as x has."""
    return modulation.reshape(len(modulation), *(1 for _ in x.shape[2:]), modulation.shape[1])


def packed_linear(x, x_scale, scale, shift, eps, weight, bias, activation, gate, residual, overwrite, out_dtype,
                  reader):
    """residual + gate * act(h W^T + bias), or (codes, scale) for the reader."""
    if scale is not None:
        scale, shift = _per_sample(scale, x), _per_sample(shift, x)
        x = F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift  # [B,...,K]
    if weight.precision == "int8":
        codes, x_scale = (x, x_scale) if x_scale is not None else quantize(x.float(), weight.smooth)
        y = F.linear(codes.double() - 128, weight.numbers().double())  # [...,N], exact
        y = (y * weight.scale * x_scale[..., None]).float()
    else:
        numbers = weight.numbers()
        y = F.linear(x.to(numbers.dtype).float(), numbers.float())  # [...,N]
    y = y if bias is None else y + bias
    y = y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if gate is not None:
        y = residual + _per_sample(gate, x) * y
    if overwrite:
        return residual.copy_(y)
    return y.to(out_dtype) if reader is None else quantize(y, reader.smooth)
