"""packed_linear on the C++ kernel. Kernel: csrc/linear/linear_cpu.cpp."""
import torch

from difuse_kernels import native


def packed_linear(x, x_scale, scale, shift, eps, weight, bias, activation, gate, residual, overwrite, out_dtype,
                  reader):
    """residual + gate * act(h W^T + bias), or (codes, scale) for the reader."""
    N, K = weight.shape
    shape = (*x.shape[:-1], N)
    if overwrite and residual.is_contiguous():
        out = residual
    else:
        out = native.empty(shape, torch.uint8 if reader is not None else out_dtype, x)
    out_scale = None if reader is None else torch.empty(shape[:-1], dtype=torch.float32, device=x.device)
    native.ext.linear(_rows(x, K), None if x_scale is None else x_scale.reshape(-1), _rows(scale, K), _rows(shift, K),
                      eps, weight.smooth, weight.data, weight.scale, weight.sums,
                      None if bias is None else bias.contiguous(), activation, _rows(gate, N), _rows(residual, N),
                      None if reader is None else reader.smooth, out.view(-1, N),
                      None if out_scale is None else out_scale.view(-1))
    if overwrite and out is not residual:
        out = residual.copy_(out)
    return out if reader is None else (out, out_scale)


def _rows(tensor, width):
    """[M,width] with a dense last dimension, a view where it can be one."""
    if tensor is None:
        return None
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()
