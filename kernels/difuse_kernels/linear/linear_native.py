"""packed_linear on the C++ kernel. Kernel: csrc/linear/linear_cpu.cpp."""
import torch

from difuse_kernels import native


def packed_linear(x, x_scale, weight, bias, activation, out_dtype, reader):
    """act(x W^T + bias), or (codes, scale) for the reader."""
    N, K = weight.shape
    shape = (*x.shape[:-1], N)
    rows = x.reshape(-1, K)  # [M,K]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = native.empty(shape, torch.uint8 if reader is not None else out_dtype, x)
    scale = None if reader is None else torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    native.ext.linear(rows, None if x_scale is None else x_scale.reshape(-1), weight.smooth, weight.data, weight.scale,
                      weight.sums, None if bias is None else bias.contiguous(), activation,
                      None if reader is None else reader.smooth, out.view(-1, N),
                      None if scale is None else scale.view(-1))
    return out if reader is None else (out, scale)
