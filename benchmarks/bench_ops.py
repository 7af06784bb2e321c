"""Every op on its `speed` cases: forward and forward + backward, and what one call costs before any work is done.

The targets are issue 2's, set for 2 cores with AVX-512.
"""
import functools
import math
from dataclasses import dataclass

import torch

import difuse_kernels
from benchmarks import rivals, roofline
from benchmarks.timing import versus
from difuse_kernels import explain_reset
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.case import Case, Maker, outgoing
from difuse_kernels.testing.cases import cases
from difuse_kernels.testing.numerics import FACTOR, OUTLIER, check_case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD, BOTH, OVERHEAD = "forward", "forward + backward", "one call, one row"
ADALN = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")


@dataclass(frozen=True)
class Target:
    """What a row must reach: at least `value` of `metric`.

    metric: "eager", "compile" or "alone" (times faster), "copy" (share of copy bandwidth), "us" (microseconds per
    call) or "memory" (peak over torch.compile's); the last two are to stay below `value`.
    shapes: of the first input, None fitting any size; no shapes fit every case.
    """

    ops: tuple
    passes: str
    metric: str
    value: float
    dtypes: tuple = ("fp32", "bf16")
    shapes: tuple = ()

    def fits(self, row):
        """Whether this target is set for the row."""
        def same(shape):
            return len(shape) == len(row["shape"]) and all(want in (None, got) for want, got in
                                                           zip(shape, row["shape"], strict=True))

        return (row["op"] in self.ops and row["pass"] == self.passes and row["dtype"] in self.dtypes
                and (not self.shapes or any(map(same, self.shapes))))

    def judge(self, row):
        """{metric, value, got, reached}; got None where the row has no such number."""
        if self.metric == "us":
            got = row["times"]["difuse"]["seconds"] * 1e6
            reached = got < self.value
        elif self.metric == "memory":
            ours, theirs = (row.get("memory", {}).get(name) for name in ("difuse", "compile"))
            got = ours / theirs if ours and theirs else None
            reached = None if got is None else got < self.value
        else:
            got = row.get("copy_share") if self.metric == "copy" else row["ratios"].get(self.metric)
            reached = None if got is None else got >= self.value
        return {"metric": self.metric, "value": self.value, "got": got, "reached": reached}


_IN_CACHE = ((8, 256, 384), (2, 256, 1152))
_OUT_OF_CACHE = ((8, 1024, 1152),)
_HEADS = tuple((None, S, H, Dh) for S in (256, 1024) for H, Dh in ((16, 72), (6, 64)))
TARGETS = (
    Target(("norm_modulate",), FORWARD, "eager", 3.0, ("fp32",), _IN_CACHE),
    Target(("norm_modulate",), FORWARD, "compile", 1.3, ("fp32",), _IN_CACHE),
    Target(("norm_modulate",), FORWARD, "copy", 0.85, ("fp32",), _OUT_OF_CACHE),
    Target(("gate_residual_norm_modulate",), FORWARD, "eager", 3.0, ("fp32",), _IN_CACHE + _OUT_OF_CACHE),
    Target(("gate_residual_norm_modulate",), FORWARD, "compile", 1.2, ("fp32",), _IN_CACHE + _OUT_OF_CACHE),
    Target(ADALN, BOTH, "eager", 2.0),
    Target(ADALN, BOTH, "compile", 1.2),
    Target(("attention",), FORWARD, "eager", 1.2, ("fp32",), _HEADS),
    Target(("attention",), FORWARD, "eager", 2.0, ("bf16",), _HEADS),
    Target(("attention",), BOTH, "eager", 1.1, ("fp32",), _HEADS),
    Target(("attention",), BOTH, "eager", 1.7, ("bf16",), _HEADS),
    Target(("sampler_step",), FORWARD, "eager", 2.0, shapes=((8, 4, 32, 32), (2, 16, 128, 128))),
    Target(("patchify", "unpatchify"), FORWARD, "eager", 1.0),
    Target(("patchify", "unpatchify"), BOTH, "eager", 1.0),
    Target((*ADALN, "attention", "patchify", "unpatchify", "sampler_step"), OVERHEAD, "us", 8.0),
)


def _modulation(make, count):
    return [make(f"m{i}", 1, 8) for i in range(count)]


ONE_ROW = [Case(op, "one_row", build, "nothing to do but the call itself", speed=True) for op, build in (
    ("norm_modulate", lambda make: ((make("x", 1, 1, 8), *_modulation(make, 2)), {})),
    ("gate_residual", lambda make: ((make("x", 1, 1, 8), make("y", 1, 1, 8), *_modulation(make, 1)), {})),
    ("gate_residual_norm_modulate",
     lambda make: ((make("x", 1, 1, 8), make("y", 1, 1, 8), *_modulation(make, 3)), {})),
    ("norm_modulate_dual", lambda make: ((make("x", 1, 1, 8), *_modulation(make, 4)), {})),
    ("attention", lambda make: (tuple(make(name, 1, 1, 1, 8) for name in "qkv"), {})),
    ("attention_packed", lambda make: ((make("qkv", 1, 1, 3, 1, 8),), {})),
    ("gated_activation", lambda make: ((make("h", 1, 1, 16),), {})),
    ("gelu_tanh", lambda make: ((make("x", 1, 1, 8),), {})),
    ("gram", lambda make: (([make("x0", 1, 8), make("x1", 1, 8)],), {})),
    ("group_norm_act", lambda make: ((make("x", 1, 4, 2, 2), 2), {})),
    ("patchify", lambda make: ((make("x", 1, 4, 2, 2), (2, 2)), {"order": "cpq"})),
    ("unpatchify", lambda make: ((make("tokens", 1, 1, 16), (2, 2), (1, 1)), {"order": "pqc"})),
    ("qk_norm_rope", lambda make: ((make("q", 1, 1, 1, 8), make("k", 1, 1, 1, 8)), {})),
    ("qk_norm_rope_joint", lambda make: (([difuse_kernels.Stream(*(make(name, 1, 1, 1, 8) for name in "qkv"))],), {})),
    ("sampler_step", lambda make: (([make(f"x{j}", 1, 8) for j in range(3)],
                                    make.constant(torch.tensor([[0.9, 0.3, -0.2]]), batched=False)), {})),
)]


def jobs(args, ceilings):
    """[(label, function returning rows)] for the cases that the arguments choose.

    Compiling takes seconds per row. A run over all ops compiles every adaln case, whose targets name torch.compile, and
    the smallest case of each other op; with --op or --case every case is compiled. --quick takes the smallest case.
    """
    chosen = []
    for op in OPS if args.op is None else (args.op,):
        found = [case for case in cases(op, speed=True) if args.case in case.name]
        smallest = min(found, key=lambda case: math.prod(first_shape(case)), default=None)
        for case in found:
            if not args.quick or case is smallest:
                compiles = not (args.no_compile or args.quick) and bool(
                    case is smallest or op in ADALN or args.op or args.case)
                chosen.append((case, (FORWARD, BOTH), compiles))
    chosen += [(case, (OVERHEAD,), False) for case in ONE_ROW
               if args.op in (None, case.op) and args.case in case.name]
    dtypes = args.dtype or ("fp32", "bf16")
    return [(f"{case} {dtype}", lambda case=case, dtype=dtype, passes=passes, compiles=compiles:
             rows(case, dtype, ceilings, passes, compiles))
            for case, passes, compiles in chosen for dtype in dtypes if passes != (OVERHEAD,) or dtype == dtypes[0]]


def first_shape(case):
    """Shape of the case's first input, without drawing a number."""
    def make(name, *shape, **options):
        return torch.empty(shape, device="meta")

    make.constant = lambda values, batched=True: values
    args, _ = case.build(make)
    first = args[0]
    while not torch.is_tensor(first):  # a list of tensors, or of streams
        first = first[0]
    return list(first.shape)


def rows(case, dtype_name, ceilings, passes=(FORWARD, BOTH), compiles=False):
    """One row per pass. Where the correctness gate fails the rows carry why, and no speed."""
    dtype, op = DTYPES[dtype_name], getattr(difuse_kernels, case.op)
    make = Maker(dtype)
    call_args, kwargs = case.build(make)
    row = {"group": "ops", "op": case.op, "case": case.name, "dtype": dtype_name, "shape": first_shape(case),
           "gate": gate(case, dtype, grads=passes != (OVERHEAD,))}
    if not row["gate"]["ok"]:
        return [{**row, "pass": name} for name in passes]

    function, rival_args = rivals.op_rival(case, call_args, kwargs)
    calls = {"difuse": lambda: op(*call_args, **kwargs), "eager": lambda: function(*rival_args)}
    explain_reset()
    with torch.no_grad():
        outputs = _tuple(calls["difuse"]())
        rivals.check_rival("eager", _tuple(calls["eager"]()), outputs, dtype)
    row["backend"] = next(iter(OPS[case.op].chosen))[0]
    leaves = [leaf for leaf in make.leaves.values() if leaf.requires_grad]
    gradients = [outgoing(out, case.grad, seed=100 * (i + 1)) for i, out in enumerate(outputs)]

    def forward_and_backward(call):
        return lambda: torch.autograd.grad(_tuple(call()), leaves, gradients)

    finished = []
    for name in passes:
        contenders = {who: forward_and_backward(call) if name == BOTH else call for who, call in calls.items()}
        result = {**row, "pass": name}
        with torch.set_grad_enabled(name == BOTH):
            if compiles:
                rival = functools.partial(rivals.compiled(function), *rival_args)
                result |= _compile(contenders, forward_and_backward(rival) if name == BOTH else rival, dtype)
            result |= versus(contenders)
        if name != OVERHEAD:
            needed = roofline.work(case.op, call_args, kwargs, outputs, name == BOTH)
            result |= roofline.against(ceilings, dtype_name, *needed, result["times"]["difuse"]["seconds"])
        result["targets"] = [target.judge(result) for target in TARGETS if target.fits(result)]
        finished.append(result)
    return finished


def _compile(contenders, rival, dtype):
    """Compile `rival` and add it to the contenders; returns what the row says about that."""
    result, seconds, why = rivals.first_call(rival)
    if why is not None:
        return {"compile_failed": why}
    rivals.check_rival("compile", _tuple(result), _tuple(contenders["eager"]()), dtype)
    contenders["compile"] = rival
    return {"compile_seconds": seconds}


def gate(case, dtype, grads=True, backend="auto"):
    """{ok, worst, error, budget} of the case on a backend: the error budget of the tests, on the timed case.

    worst is the tensor nearest to its budget, or beyond it; with an exception it says what was raised.
    """
    try:
        lines = check_case(case, dtype, backend, grads=grads)
    except (RuntimeError, AssertionError) as error:
        return {"ok": False, "worst": f"{type(error).__name__}: {error}", "error": None, "budget": None}
    by_rms = [(f"rms of {line.name}", line.rms, FACTOR * line.eager_rms + line.unit * line.oracle_rms, line.ok)
              for line in lines]
    by_outlier = [(f"largest error of {line.name}", line.largest_error,
                   OUTLIER * line.eager_largest_error + line.unit * line.largest, line.ok) for line in lines]
    return verdict(by_rms + by_outlier)


def verdict(lines):
    """The gate's answer from (name, error, budget, ok) of every compared tensor; the worst of them is named."""
    name, error, budget, ok = max(lines, key=lambda line: (not line[3], line[1] / max(line[2], 1e-300)))
    if not math.isfinite(error):
        return {"ok": False, "worst": f"{name} is not finite", "error": None, "budget": budget}
    return {"ok": ok, "worst": name, "error": error, "budget": budget}


def _tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)
