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


def packed_linear(x, x_scale, weight, bias, activation, out_dtype, reader):
    """act(x W^T + bias), or (codes, scale) for the reader."""
    if weight.precision == "int8":
        codes, scale = (x, x_scale) if x_scale is not None else quantize(x.float(), weight.smooth)
        y = F.linear(codes.double() - 128, weight.numbers().double())  # [...,N], exact
        y = (y * weight.scale * scale[..., None]).float()
    else:
        numbers = weight.numbers()
        y = F.linear(x.to(numbers.dtype).float(), numbers.float())  # [...,N]
    y = y if bias is None else y + bias
    y = y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y.to(out_dtype) if reader is None else quantize(y, reader.smooth)
