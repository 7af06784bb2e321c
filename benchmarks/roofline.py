"""What this machine can do at best, and how much of it a case needs: bytes against bandwidth, FLOPs against GEMM."""
import math
import pathlib

import torch
import torch.nn.functional as F

from benchmarks.timing import interleaved

BUFFER = 128 << 20  # bytes, unless the last cache is larger than a quarter of it
GEMM_SIZE = {torch.float32: 2048, torch.bfloat16: 1024, torch.float16: 1024}  # 16-bit may be emulated, and slow

# Per op: positions of the inputs and of the outputs that a backward pass has to read again, beside the incoming
# gradients. Every gradient is written once; that of gate_residual's x is the incoming one, handed on.
BACKWARD_READS = {
    "norm_modulate": ((0, 1), ()),
    "gate_residual": ((1, 2), ()),
    "gate_residual_norm_modulate": ((1, 2, 3), (0,)),
    "norm_modulate_dual": ((0, 1, 3), ()),
    "attention": ((0, 1, 2), (0,)),
    "attention_packed": ((0,), (0,)),
    "patchify": ((), ()),
    "unpatchify": ((), ()),
    "sampler_step": ((), ()),
    "gated_activation": ((0,), ()),
    "gelu_tanh": ((0,), ()),
    "gram": ((0, 1, 2, 3), ()),
    "group_norm_act": ((0,), ()),
    "qk_norm_rope": ((0, 1), ()),
    "qk_norm_rope_joint": (tuple(9 * i + field for i in range(4) for field in (0, 1, 7, 8)), ()),  # v's is handed on
}
FLOPS_PER_ELEMENT = {  # forward, backward; LayerNorm 6, modulate 2, gate 2, an activation 10, a rotation 3
    "norm_modulate": (8, 13),
    "gate_residual": (2, 3),
    "gate_residual_norm_modulate": (10, 16),
    "norm_modulate_dual": (10, 18),
    "gated_activation": (10, 20),
    "gelu_tanh": (10, 20),
    "group_norm_act": (17, 28),
    "qk_norm_rope": (8, 16),
    "qk_norm_rope_joint": (8, 16),
    "patchify": (0, 0),
    "unpatchify": (0, 0),
}


def ceilings(dtypes):
    """Measured medians: bytes/s of copying a large buffer (read plus written), FLOP/s of a matrix product per dtype.

    "copy" writes into memory that is already there and is what percentages refer to; "clone" into fresh memory, whose
    page faults every op that allocates its output pays too.
    """
    size = min(max(BUFFER, 4 * (last_level_cache() or 0)), 1 << 30)
    source = torch.ones(size // 4)
    target = torch.zeros_like(source)
    found = interleaved({"copy": lambda: target.copy_(source), "clone": source.clone})
    measured = {"buffer_bytes": size} | {f"{name}_bytes_per_second": 2 * size / timing.seconds
                                         for name, timing in found.items()}
    for name, dtype in dtypes.items():
        n = GEMM_SIZE[dtype]
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        seconds = interleaved({"gemm": lambda a=a, b=b: F.linear(a, b)})["gemm"].seconds
        measured[f"gemm_{name}_flops_per_second"] = 2 * n**3 / seconds
    return measured


def last_level_cache():
    """Bytes of the largest cache of the first core, or None where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [path.read_text().strip() for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in sizes if text[-1:] in units), default=None)


def work(op, args, kwargs, outputs, backward):
    """(bytes, FLOPs) of one forward pass, or of forward and backward, each tensor read or written once."""
    if op == "qk_norm_rope_joint":
        inputs = [tensor for stream in args[0] for tensor in stream]
    else:
        inputs = [*args[0], *args[1:]] if op in ("gram", "sampler_step") else [*args, *kwargs.values()]
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    total = sum(map(_bytes, tensors)) + sum(map(_bytes, outputs))
    if backward:
        again_inputs, again_outputs = BACKWARD_READS[op]
        again = [inputs[i] for i in again_inputs if i < len(inputs)] + [outputs[i] for i in again_outputs]
        if again_inputs:
            again += [kwargs.get(name) for name in ("weight", "gate_table", "scale_table", "cos", "sin")]
        handed_on = {"gate_residual": inputs[:1], "qk_norm_rope_joint": inputs[2::9]}.get(op, ())
        gradients = [t for t in tensors if t.requires_grad and not any(t is other for other in handed_on)]
        incoming = outputs[:2] if op == "qk_norm_rope_joint" else outputs
        total += sum(map(_bytes, incoming)) + sum(map(_bytes, again)) + sum(map(_bytes, gradients))
    return total, _flops(op, args, outputs, backward)


def _flops(op, args, outputs, backward):
    if op == "attention_packed":
        op, args = "attention", args[0].unbind(2)
    if op == "attention":
        batch, queries, heads, head_dim = args[0].shape
        products = 2 + (5 if backward else 0)  # qk, pv; then both again and qk recomputed
        return products * 2 * batch * heads * queries * args[1].shape[1] * head_dim
    elements = sum(out.numel() for out in (outputs[:2] if op.startswith("qk_norm_rope") else outputs[-1:]))
    if op == "gram":
        n = len(args[0])
        return n * (n + 2) * args[0][0].numel() * (1 + backward)  # n sums, n (n + 1) / 2 products and theirs
    if op == "sampler_step":
        return 2 * len(args[0]) * len(outputs) * elements * (1 + backward)
    forward, more = FLOPS_PER_ELEMENT[op]
    return elements * (forward + (more if backward else 0))


def _bytes(tensor):
    """Bytes behind a tensor (or None), each element once however often it is expanded."""
    if not isinstance(tensor, torch.Tensor):
        return 0
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * tensor.element_size()


def against(measured, dtype_name, total_bytes, flops, seconds):
    """The part of a row that compares it with the ceilings.

    predicted_seconds: the longer of bytes over copy bandwidth and FLOPs over the GEMM rate, the better of this dtype's
    and float32's; share: predicted over reached; copy_share: the bytes alone. Data that fits into the last cache
    (in_cache) may exceed 1. The last cache is measured["cache_bytes"], or this CPU's.
    """
    by_bytes = total_bytes / measured["copy_bytes_per_second"]
    by_flops = flops / max(measured[f"gemm_{name}_flops_per_second"] for name in ("fp32", dtype_name))
    cache = measured.get("cache_bytes") or last_level_cache() or 0
    return {"bytes": total_bytes, "flops": flops, "predicted_seconds": max(by_bytes, by_flops),
            "bound": "bytes" if by_bytes >= by_flops else "flops", "share": max(by_bytes, by_flops) / seconds,
            "copy_share": by_bytes / seconds, "in_cache": total_bytes < cache}
