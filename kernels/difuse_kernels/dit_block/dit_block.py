"""dit_block: a block of DiT (Peebles & Xie 2023, arXiv:2212.09748, adaLN-Zero) on packed weights, in one call.

    x' = x  + gate_msa * proj(attention(qkv(LayerNorm(x) (1 + scale_msa) + shift_msa)))
    x''= x' + gate_mlp * fc2(act(fc1(LayerNorm(x') (1 + scale_mlp) + shift_mlp)))

x [B,S,D] float32; modulation [B,6*D] float32 holds shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp side
by side; the four products are pairs of a PackedWeight and a bias [N] or None, see `packed_linear`, which tells what is
rounded; qkv may be a list of three such pairs. Between qkv and attention and, unless fc2 is an int8 weight, between fc1
and fc2 numbers are of `dtype`; before fc2 of int8 they are codes. For inference on CPUs, like packed_linear: there are
no gradients, and nothing of it is in explain().
"""
import torch

from difuse_kernels import native
from difuse_kernels.checks import KERNEL_DTYPES, check_one_of, needs_grad
from difuse_kernels.dispatch import forced_backend
from difuse_kernels.dit_block import dit_block_native, dit_block_reference
from difuse_kernels.linear.linear import ACTIVATIONS, PackedWeight


class Workspace:
    """The scratch of one thread's calls, kept for the next ones: as much as the largest call needed."""

    def __init__(self):
        self._buffers = {}

    def take(self, name, shape, dtype):
        """An uninitialised tensor; the same memory for the same name."""
        size = torch.Size(shape).numel()
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            self._buffers[name, dtype] = buffer = torch.empty(size, dtype=dtype, device="cpu")
        return buffer[:size].view(shape)

    def nbytes(self):
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


def dit_block(x, modulation, qkv, proj, fc1, fc2, *, heads, activation="gelu_tanh", eps=(1e-6, 1e-6),
              dtype=torch.float32, workspace=None, overwrite=False):
    """x'' [B,S,D], a new tensor or, with `overwrite`, x itself. eps: of the two norms.

    workspace: a Workspace that no other thread uses meanwhile. Raises ValueError or TypeError for a wrong shape, dtype
    or device.
    """
    three = isinstance(qkv, list)
    first = {f"{name} of qkv": (pair, 1, 1) for name, pair in zip("qkv", qkv, strict=True)} if three else {
        "qkv": (qkv, 3, 1)}
    _check(x, modulation, heads, {**first, "proj": (proj, 1, 1), "fc1": (fc1, None, 1), "fc2": (fc2, 1, None)})
    check_one_of("dit_block", "activation", activation, ACTIVATIONS)
    check_one_of("dit_block", "dtype", dtype, KERNEL_DTYPES)
    backend = dit_block_reference if native.ext is None or forced_backend() == "reference" else dit_block_native
    return backend.dit_block(x, modulation, qkv if three else [qkv], proj, fc1, fc2, heads, activation, eps, dtype,
                             workspace or Workspace(), overwrite)


def _check(x, modulation, heads, products):
    for name, value, dims in (("x", x, 3), ("modulation", modulation, 2)):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or not value.is_cpu:
            got = f"{value.dtype} on {value.device}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"dit_block: {name} is {got}; expected torch.float32 on the CPU")
        if value.dim() != dims:
            raise ValueError(f"dit_block: {name} has shape {tuple(value.shape)}; expected "
                             f"{'[B,S,D]' if dims == 3 else '[B,6*D]'}")
    if needs_grad(x, modulation):
        raise ValueError("dit_block: it has no gradients; call it under torch.no_grad()")
    B, _, D = x.shape
    if modulation.shape != (B, 6 * D):
        raise ValueError(f"dit_block: modulation has shape {tuple(modulation.shape)}; expected {(B, 6 * D)}")
    if D % heads or D // heads % 8 or D // heads > 256:
        raise ValueError(f"dit_block: {heads} heads share {D} channels; expected a multiple of 8 up to 256 each")
    hidden = products["fc1"][0][0].shape[0]
    for name, ((weight, bias), outputs, inputs) in products.items():
        expected = (hidden if outputs is None else outputs * D, hidden if inputs is None else inputs * D)
        if not isinstance(weight, PackedWeight) or weight.shape != expected:
            got = weight.shape if isinstance(weight, PackedWeight) else type(weight).__name__
            raise ValueError(f"dit_block: {name} is {got}; expected a PackedWeight of {expected}")
        if bias is not None and (bias.shape != expected[:1] or bias.dtype != torch.float32):
            raise ValueError(f"dit_block: the bias of {name} is {tuple(bias.shape)} {bias.dtype}; expected "
                             f"{expected[:1]} torch.float32")
