"""attention on the C++ kernels: allocate the outputs, hand over, return. Kernels: csrc/attention/, for the CPU."""
import torch

from difuse_kernels.checks import KERNEL_DTYPES, dense_last


class Launchers:
    """The functions of one backend; `machine` is native.py."""

    def __init__(self, machine):
        self.ext, self.machine, self.empty_like = machine.ext, machine, machine.empty_like

    def unsupported(self, _op, inputs):
        """Why these inputs cannot run here, or None."""
        *tensors, _, key_bias = inputs
        head_dim = tensors[0].shape[-1]
        if head_dim % 8 or head_dim > 256:
            return "the head dimension is not a multiple of 8 up to 256"
        if key_bias is not None and key_bias.dtype not in KERNEL_DTYPES:
            return f"key_bias has dtype {key_bias.dtype}; the kernels take float32, bfloat16 and float16"
        return self.machine.unsupported(tensors)

    def attention_forward(self, q, k, v, kv_lengths, key_bias, scale, save):
        """(out, stats); stats [B,H,Sq,2], each query's largest score and 1 / sum, is None unless `save`."""
        out, stats = self.empty_like(q), None
        if save:
            batch, queries, heads, _ = q.shape
            stats = self.machine.empty((batch, heads, queries, 2), torch.float32, q)
        self.ext.attention_forward(q, k, v, kv_lengths, key_bias, scale, out, stats)
        return out, stats

    def attention_backward(self, grad, q, k, v, kv_lengths, key_bias, _out, stats, scale, needs, into=None):
        """Gradients of q, k, v, key_bias, None where not needed; those of q, k, v in the tensors `into` if given."""
        dq, dk, dv = into or (self.empty_like(t) if need else None
                              for t, need in zip((q, k, v), needs, strict=False))
        dbias = self.empty_like(key_bias) if needs[3] else None
        self.ext.attention_backward(dense_last(grad), q, k, v, kv_lengths, key_bias, scale, stats, dq, dk, dv, dbias)
        return dq, dk, dv, dbias

    def attention_packed_forward(self, qkv, kv_lengths, key_bias, scale, save):
        """attention_forward on the three of qkv [B,S,3,H,Dh]."""
        return self.attention_forward(*qkv.unbind(2), kv_lengths, key_bias, scale, save)

    def attention_packed_backward(self, grad, qkv, kv_lengths, key_bias, out, stats, scale, needs):
        """Gradients of qkv and key_bias; None where not needed."""
        dqkv = self.empty_like(qkv) if needs[0] else None
        into = dqkv.unbind(2) if needs[0] else None
        dbias = self.attention_backward(grad, *qkv.unbind(2), kv_lengths, key_bias, out, stats, scale,
                                        (needs[0],) * 3 + (needs[1],), into)[3]
        return dqkv, dbias
