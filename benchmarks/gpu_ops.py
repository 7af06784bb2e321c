"""Every op on the GPU: correctness gate, then device time of both GPU backends beside eager, torch.compile and others.

Inputs and results rotate among sets that together are several times the L2, so that no call is served from the call
before it. Times are the device's alone: calls are queued while it waits. What a call costs the host is measured apart.
"""
import functools
import itertools

import torch
from torch.utils._pytree import tree_leaves, tree_map

import difuse_kernels
from benchmarks import rivals, roofline
from benchmarks.bench_ops import BOTH, DTYPES, FORWARD, ONE_ROW, first_shape, gate
from benchmarks.gpu_cases import drawn_once, on_gpus, production
from benchmarks.gpu_ceilings import kernel_backends
from benchmarks.gpu_device import QueuedClock
from benchmarks.gpu_plan import Job
from benchmarks.gpu_rivals import further
from benchmarks.timing import versus
from difuse_kernels.testing.case import Maker, outgoing
from difuse_kernels.testing.cases import cases
from difuse_kernels.testing.numerics import backends_here

GRAPH = "forward, graph replay"
SMALL = 32 << 20  # bytes; below, launches cost as much as the work, and graph replay is measured too
MOST_SETS = 24
BOUND_BY_PRODUCTS = ("attention", "attention_packed")
DTYPE = "bf16"


def jobs(device):
    """Production calls first, then the speed cases; then the production calls once more, with torch.compile."""
    large, small = (on_gpus(ONE_ROW), []) if device.dry else (production(), on_gpus(cases(speed=True)))
    found = [Job("ops", f"ops {case}", functools.partial(rows, device, case), "ops") for case in (*large, *small)]
    return found + [Job("ops", f"ops {case}, compiled", functools.partial(rows, device, case, compiles=True),
                        "compiled ops", least=20.0, cap=75.0, may_be_cut=True)
                    for case in (large[:2] if device.dry else large)]


class Sets:
    """The arguments of one case several times over. Weights and tables, given by name, are one and the same in all.

    Every tensor handed over is a leaf, so that a backward pass ends with the op and gathers no gradients of views.
    """

    def __init__(self, case, dtype, device):
        case = drawn_once(case, device.name)
        args, self.kwargs = leaves_of(case.build(Maker(dtype, device=device.name)))
        self.op = getattr(difuse_kernels, case.op)
        with torch.no_grad():
            outputs = as_tuple(self.op(*args, **self.kwargs, backend=kernel_backends(case.op)[0]))
        self.work = {name: roofline.work(case.op, args, self.kwargs, outputs, name == BOTH) for name in (FORWARD, BOTH)}
        count = min(max(2, -(-device.sets_bytes // max(self.work[FORWARD][0], 1))), MOST_SETS)
        self.args = [args] + [leaves_of(case.build(Maker(dtype, device=device.name)))[0] for _ in range(count - 1)]
        self.leaves = [[t for t in tree_leaves((one, self.kwargs)) if torch.is_tensor(t) and t.requires_grad]
                       for one in self.args]
        gradients = [outgoing(out, case.grad, seed=100 * (i + 1)) for i, out in enumerate(outputs)]
        self.incoming = [[gradient.clone() for gradient in gradients] for _ in self.args]
        self.eager, _ = rivals.op_rival(case, args, self.kwargs)
        self.rival_args = [rivals.op_rival(case, one, self.kwargs)[1] for one in self.args]

    def rotating(self, function, arguments, backward=False):
        """A function that calls `function` on the next set each time, and keeps every set's latest results alive."""
        at, kept = itertools.count(), [None] * len(self.args)

        def call():
            i = next(at) % len(kept)
            results = as_tuple(function(*arguments[i]))
            if backward:
                results = torch.autograd.grad(results, self.leaves[i], self.incoming[i])
            kept[i] = results
            return results

        return call


def leaves_of(tree):
    """The same arguments, where they lie, every tensor cut off from what it is a view of."""
    return tree_map(lambda t: t.detach().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t, tree)


def rows(device, case, compiles=False):
    """A row per pass. Where a backend's gate fails the rows say which, and hold no speed."""
    backends, dtype = kernel_backends(case.op), DTYPES[DTYPE]
    row = {"group": "ops", "op": case.op, "case": case.name, "dtype": DTYPE, "shape": first_shape(case)}
    if not backends:
        yield {**row, "pass": FORWARD, "skipped": f"no GPU kernels here, only {', '.join(backends_here(case.op))}"}
        return
    row["backend"] = backends[0]
    row["gate"] = gates(device, case, dtype, tuple(backends))
    if not row["gate"]["ok"]:
        yield from ({**row, "pass": name} for name in (FORWARD, BOTH))
        return
    sets = Sets(case, dtype, device)
    options = device.timing(15, 5e-4, QueuedClock(device))
    ours = {"difuse" if backend is backends[0] else backend: functools.partial(sets.op, backend=backend, **sets.kwargs)
            for backend in backends}
    with torch.no_grad():
        expected = as_tuple(ours["difuse"](*sets.args[0]))
    others = further(case, sets.kwargs)
    functions = {name: (function, sets.args) for name, function in (*ours.items(), *others.items())}
    functions["eager"] = (sets.eager, sets.rival_args)
    remarks = {}
    if compiles:
        functions["compile"] = (rivals.compiled(sets.eager, **device.compile_ops), sets.rival_args)
    for name in (FORWARD, BOTH):
        with torch.set_grad_enabled(name == BOTH):
            contenders, result = {}, {**row, "pass": name}
            for who, (function, arguments) in functions.items():
                contender = sets.rotating(function, arguments, name == BOTH)
                first, seconds, why = rivals.first_call(contender)
                if why is not None:
                    remarks[who] = why
                    continue
                if name == FORWARD and who not in ours:
                    rivals.check_rival(who, first, expected, dtype)
                if who == "compile":
                    result["compile_seconds"] = seconds
                contenders[who] = contender
            if not set(ours) <= set(contenders):
                raise RuntimeError(f"{case}, {name}: {remarks}")
            if name == FORWARD and case.op not in BOUND_BY_PRODUCTS:
                contenders["copy"] = copying(sets.work[name][0], device, len(sets.args))
            result |= versus(contenders, **options)
            result["bytes"], result["flops"] = sets.work[name]
            yield result | ({"refused": dict(remarks)} if remarks else {})
            if name == FORWARD and sets.work[name][0] < SMALL:
                yield {**row, "pass": GRAPH} | replays(device, {who: contenders[who] for who in (*ours, "eager")},
                                                       len(sets.args), options)


def copying(total_bytes, device, count):
    """A copy that moves as many bytes, in rotating buffers: the ceiling at the size of this case."""
    elements = max(total_bytes // 8, 1)
    pairs = [(torch.ones(elements, device=device.name), torch.empty(elements, device=device.name))
             for _ in range(count)]
    at = itertools.count()

    def call():
        source, target = pairs[next(at) % count]
        target.copy_(source)

    return call


def replays(device, contenders, count, options):
    """Times of one call within a CUDA graph that holds one call on every set."""
    graphs = {who: device.capture(lambda call=call: [result for _ in range(count) for result in call()])
              for who, call in contenders.items()}
    timed = versus({who: replay for who, (replay, _) in graphs.items()}, **options)
    for timing in timed["times"].values():
        timing["seconds"] /= count
    return timed


@functools.cache
def gates(device, case, dtype, backends):
    """The gate of every backend; the one that fails, or comes nearest to its budget."""
    drawn = drawn_once(case, device.name)
    found = []
    for backend in backends:
        verdict = gate(drawn, dtype, backend=backend)
        found.append(verdict | {"worst": f"{backend}: {verdict['worst']}"})
        device.release()
    return min(found, key=lambda one: (one["ok"], -(one["error"] or 0) / (one["budget"] or 1)))


def as_tuple(outputs):
    """Results of any function, as a tuple."""
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
