"""dit_block in plain PyTorch: the specification."""
import torch

from difuse_kernels.attention.attention_reference import attention_packed
from difuse_kernels.linear.linear import Codes
from difuse_kernels.linear.linear_reference import packed_linear


def dit_block(x, modulation, qkv, proj, fc1, fc2, heads, activation, eps, dtype, _workspace, overwrite):
    """See the contract."""
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # each [B,D]

    def product(h, weight, *, scale=None, shift=None, eps=0, activation="none", gate=None, residual=None,
                out_dtype=torch.float32, reader=None):
        codes, h_scale = h if isinstance(h, Codes) else (h, None)
        found = packed_linear(codes, h_scale, scale, shift, eps, *weight, activation, gate, residual, False, out_dtype,
                              reader)
        return found if reader is None else Codes(*found)

    h = torch.cat([product(x, pair, scale=scale_msa, shift=shift_msa, eps=eps[0], out_dtype=dtype) for pair in qkv],
                  -1)  # [B,S,3*D]
    h = h.unflatten(-1, (3, heads, -1))  # [B,S,3,H,Dh]
    attended = attention_packed(h, None, None, h.shape[-1] ** -0.5).flatten(2)  # [B,S,D]
    y = product(attended, proj, gate=gate_msa, residual=x)  # [B,S,D]
    reader = fc2[0] if fc2[0].precision == "int8" else None
    h = product(y, fc1, scale=scale_mlp, shift=shift_mlp, eps=eps[1], activation=activation, out_dtype=dtype,
                reader=reader)  # [B,S,F]
    y = product(h, fc2, gate=gate_mlp, residual=y)  # [B,S,D]
    return x.copy_(y) if overwrite else y
