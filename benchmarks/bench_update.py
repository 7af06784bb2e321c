"""Guided sampler updates without a model: ours, diffusers' `scheduler.step` with its guidance in front, and both fused.

One measurement is a whole trajectory of updates on the same answers, divided by its steps, so that every scheduler has
the history that it would have. The coefficients of ours are computed beforehand, as they are before a loop; what they
cost is planned_seconds in the JSON file.
"""
import functools
import importlib.util
import time

import torch

from benchmarks.bench_frozen import error
from benchmarks.bench_ops import Target, verdict
from benchmarks.timing import versus
from difuse.diffusion import SAMPLERS, VP, Flow
from difuse.diffusion.program import Map, Run
from difuse_kernels import use_backend

SHAPES = {"2 x [16,128,128]": (2, 16, 128, 128), "8 x [4,32,32]": (8, 4, 32, 32)}
STEPS, W = 20, 4.0
UPDATE = "one step"
TARGET = Target((), UPDATE, "eager", 3.0)
CASES = {  # sampler -> (class of diffusers, its options, our process, prediction, spacing, options)
    "ddim": ("DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=True), VP(), "eps", None, {}),
    "dpm_solver_pp_2m": ("DPMSolverMultistepScheduler", dict(), VP(), "eps", None, {}),
    "unipc": ("UniPCMultistepScheduler", dict(solver_order=2), VP(), "eps", None, {"order": 2}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", dict(), Flow(), "flow", None, {}),
}


def jobs(args, ceilings):
    """[(label, function returning rows)]; nothing without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return []
    found = [(name, case) for name in CASES for case in SHAPES if args.case in f"{name}, {case}"]
    return [(f"update {name}, {case}", functools.partial(rows, name, case))
            for name, case in (found[:1] if args.quick else found)]


@torch.no_grad()
def rows(name, case):
    """One row: a guided update of this sampler in float32."""
    import diffusers

    from difuse.integrations.schedulers import from_diffusers

    shape, (cls, config, process, prediction, spacing, options) = SHAPES[case], CASES[name]
    generator = torch.Generator().manual_seed(0)
    x, answers = torch.randn(shape, generator=generator), torch.randn(2 * shape[0], *shape[1:], generator=generator)
    null, cond = answers.chunk(2)  # diffusers' order
    began = time.perf_counter()
    program = SAMPLERS[name].program(process, STEPS, prediction, W, spacing=spacing, **options)
    tables = program.tables("cpu")
    planned = time.perf_counter() - began

    def ours():
        run = Run(program, (x,), None, tables=tables)
        while run.advance() is not None:
            run.give((cond, null, cond))
        return run.x

    original = getattr(diffusers, cls)(**config)
    original.set_timesteps(STEPS)
    swapped = from_diffusers(original)

    def theirs(scheduler):
        def call():
            scheduler.set_timesteps(STEPS)
            sample = x
            for t in scheduler.timesteps:
                uncond, text = answers.chunk(2)
                sample = scheduler.step(uncond + W * (text - uncond), t, sample, return_dict=False)[0]
            return sample

        return call

    with use_backend("reference"):
        expected = ours()
    found = error(ours(), expected.double())
    row = {"group": "update", "op": "sampler update", "case": f"{name}, {case}, guided", "dtype": "fp32",
           "pass": UPDATE, "shape": list(shape),
           "gate": verdict([("out", found, 1e-5, found <= 1e-5)]),
           "errors": {"difuse": found, "from_diffusers": error(theirs(swapped)(), theirs(original)().double())},
           "maps": sum(isinstance(each, Map) for each in program.instructions), "planned_seconds": planned}
    if row["gate"]["ok"]:
        speeds = versus({"difuse": ours, "eager": theirs(original), "from_diffusers": theirs(swapped)})
        for timing in speeds["times"].values():
            timing["seconds"] /= STEPS
        row |= speeds
        row["targets"] = [TARGET.judge(row)]
    return [row]
