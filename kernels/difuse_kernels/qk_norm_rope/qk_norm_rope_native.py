"""qk_norm_rope on the C++ kernels, for the CPU and for CUDA: allocate, hand over, return.

Kernels: csrc/qk_norm_rope/qk_norm_rope_cpu.cpp, qk_norm_rope_cuda.cu.
"""
from difuse_kernels.checks import dense_last

_NORMS = {None: 0, "rms": 1, "layer": 2}


class Launchers:
    """The functions of one backend; `machine` is native.py or native_cuda.py."""

    def __init__(self, machine):
        self.ext, self.machine, self.empty_like = machine.ext, machine, machine.empty_like
        self.qk_norm_rope_joint_forward = self.qk_norm_rope_forward
        self.qk_norm_rope_joint_backward = self.qk_norm_rope_backward

    def unsupported(self, _op, inputs):
        """Why these inputs cannot run here, or None. The last two of each stream, cos and sin, may be strided."""
        return self.machine.unsupported([t if t is None or i % 9 < 7 or t.stride(-1) == 1 else t.unsqueeze(-1)
                                         for i, t in enumerate(inputs)])

    def _forward(self, parts, outputs, weights, biases, tables, norm, norm_scope, eps, rope, inverse):
        self.ext.qk_norm_rope_forward(parts, outputs, weights, biases, *tables, _NORMS[norm], norm_scope == "full",
                                      rope == "interleaved", inverse, eps)

    def qk_norm_rope_forward(self, *arguments):
        """(q, k, v) of all streams joined over the tokens; k or v None where the streams have none.

        arguments: the 9 fields of each stream, then norm, norm_scope, eps, rope.
        """
        *inputs, norm, norm_scope, eps, rope = arguments
        streams = [inputs[i : i + 9] for i in range(0, len(inputs), 9)]
        if len(streams) == 1:
            outputs = [None if x is None else self.empty_like(x) for x in inputs[:3]]
            self._forward(inputs[:3], outputs, inputs[3:5], inputs[5:7], inputs[7:], norm, norm_scope, eps, rope, False)
            return tuple(outputs)
        tokens = sum(stream[0].shape[1] for stream in streams)
        outputs = [self.machine.empty((x.shape[0], tokens, *x.shape[2:]), x.dtype, x) for x in inputs[:3]]
        start = 0
        for stream in streams:
            here = slice(start, start + stream[0].shape[1])
            self._forward(stream[:3], [out[:, here] for out in outputs], stream[3:5], stream[5:7], stream[7:], norm,
                          norm_scope, eps, rope, False)
            start = here.stop
        return tuple(outputs)

    def qk_norm_rope_backward(self, grad_q, grad_k, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, norm,
                              norm_scope, eps, rope, needs):
        """One stream's gradients of q, k, q_weight, k_weight, q_bias, k_bias; None where not needed or without one.

        grad_q or grad_k may be None; q and k are not needed (may be None) where norm is None.
        """
        grads = [None if grad is None else dense_last(grad) for grad in (grad_q, grad_k)]
        absent = grads * 3

        def wanted(i, like):
            return self.empty_like(like) if needs[i] and absent[i] is not None else None

        if norm is None:  # turning back
            dx = [wanted(i, grad) for i, grad in enumerate(grads)]
            grads = [None if d is None else grad for d, grad in zip(dx, grads, strict=True)]
            self._forward(grads, dx, (None, None), (None, None), (cos, sin), norm, norm_scope, eps, rope, True)
            return *dx, None, None, None, None
        found = [wanted(i, like) for i, like in enumerate((q, k, q_weight, k_weight, q_bias, k_bias))]
        self.ext.qk_norm_rope_backward(grads, (q, k), (q_weight, k_weight), cos, sin, norm == "layer",
                                       norm_scope == "full", rope == "interleaved", eps, found[:2], found[2:4],
                                       found[4:])
        return tuple(found)
