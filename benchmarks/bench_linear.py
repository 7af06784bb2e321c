"""Products of packed weights at a DiT's shapes: ours against eager's, and against oneDNN's on weights it has packed.

The same work for all: bias and, before the MLP's second product, a GELU; with 8 bits also the codes of the input and
the floats of the result, which are passes of their own around oneDNN's integers, in torch's operations. Eager is
float32's where precision is int8, for which it has no dynamic product of its own.
"""
import functools

import torch
import torch.nn.functional as F

from benchmarks import roofline
from benchmarks.bench_frozen import INT8_ERROR, error
from benchmarks.bench_ops import verdict
from benchmarks.timing import versus
from difuse.inference.packed import multiplies_bfloat16
from difuse.integrations.products import emulates_bfloat16
from difuse_kernels import pack_linear, packed_linear
from difuse_kernels.linear.linear_reference import quantize
from difuse_kernels.testing.numerics import FACTOR

CASES = {  # M, K, N, GELU
    "DiT-S/2 batch 8, qkv": (2048, 384, 1152, False), "DiT-S/2 batch 8, fc1": (2048, 384, 1536, True),
    "DiT-S/2 batch 8, fc2": (2048, 1536, 384, False), "DiT-XL/2 batch 1, qkv": (256, 1152, 3456, False),
    "DiT-XL/2 batch 1, fc1": (256, 1152, 4608, True), "DiT-XL/2 batch 1, fc2": (256, 4608, 1152, False),
    "DiT-XL/2 batch 2, modulation": (2, 1152, 6912, False),
}
PRECISIONS = ("fp32", "bf16", "int8")


def jobs(args, ceilings):
    """[(label, function returning rows)]: every case in every precision; 8 bits beside float32."""
    chosen = [name for name in PRECISIONS if name.replace("int8", "fp32") in (args.dtype or PRECISIONS)
              and (name != "bf16" or multiplies_bfloat16())]
    found = [(case, precision) for case in CASES for precision in chosen if args.case in case]
    return [(f"packed_linear {case}, {precision}", functools.partial(rows, case, precision, ceilings))
            for case, precision in (found[:1] if args.quick else found)]


@torch.no_grad()
def rows(case, precision, ceilings):
    """One row: the product as a frozen model calls it."""
    M, K, N, gelu = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((M, K), (N, K), (N,)))
    weight /= K**0.5
    act = (lambda y: F.gelu(y, approximate="tanh")) if gelu else (lambda y: y)
    packed, name = pack_linear(weight, precision), "gelu_tanh" if gelu else "none"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    eager = [t.to(dtype) for t in (x, weight, bias)]
    calls = {"difuse": lambda: packed_linear(x, packed, bias, activation=name),
             "eager": lambda: act(F.linear(*eager)), "onednn": _onednn(x, weight, bias, precision, act)}
    if calls["onednn"] is None:
        del calls["onednn"]
    truth = act(F.linear(x.double(), weight.double(), bias.double()))
    errors = {who: error(call(), truth) for who, call in calls.items()}
    allowed = INT8_ERROR if precision == "int8" else FACTOR * errors["eager"] + torch.finfo(torch.float32).eps
    row = {"group": "linear", "op": "packed_linear", "case": f"{case}, [{M},{K}] to {N}{', GELU' if gelu else ''}",
           "dtype": precision, "pass": "forward", "shape": [M, K, N], "errors": errors, "targets": [],
           "gate": verdict([("out", errors["difuse"], allowed, errors["difuse"] <= allowed)])}
    if row["gate"]["ok"]:
        row |= versus(calls)
        if precision != "int8":
            size = {"fp32": 4, "bf16": 2}[precision]
            row |= roofline.against(ceilings, precision, size * (M * K + N * K + M * N), 2 * M * N * K,
                                    row["times"]["difuse"]["seconds"])
    return [row]


def _onednn(x, weight, bias, precision, act):
    """The product by torch's oneDNN on a weight that it has packed; None where torch cannot."""
    if not torch.backends.mkldnn.is_available() or (precision == "bf16" and emulates_bfloat16()):
        return None
    if precision != "int8":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        packed, bias = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype)), bias.to(dtype)
        return lambda: act(torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")).float()
    scale = weight.abs().amax(1) / 127
    packed = torch.ops.onednn.qlinear_prepack((weight / scale[:, None]).round().to(torch.int8), None)
    zeros = torch.zeros(len(scale), dtype=torch.int32)

    def call():
        codes, row = quantize(x)
        sums = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32,
                                                  "none", [], "")
        return act(sums * row[:, None] + bias)

    return call
