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
from difuse.diffusion import APG, SAMPLERS, VP, Flow, Guidance
from difuse.diffusion.program import Map
from difuse.diffusion.run import Run
from difuse_kernels import use_backend

SHAPES = {"2 x [16,128,128]": (2, 16, 128, 128), "8 x [4,32,32]": (8, 4, 32, 32)}
STEPS, W = 20, 4.0
UPDATE = "one step"
TARGET = Target((), UPDATE, "eager", 3.0)
DDIM = "DDIMScheduler", dict(clip_sample=False, set_alpha_to_one=True), VP(), "eps", {}
FLOW = "FlowMatchEulerDiscreteScheduler", dict(), Flow(), "flow", {}
CASES = {  # (sampler, rule of guidance) -> (class of diffusers, its options, our process, prediction, options)
    ("ddim", "plain"): DDIM,
    ("dpm_solver_pp_2m", "plain"): ("DPMSolverMultistepScheduler", dict(), VP(), "eps", {}),
    ("unipc", "plain"): ("UniPCMultistepScheduler", dict(solver_order=2), VP(), "eps", {"order": 2}),
    ("flow_euler", "plain"): FLOW,
    ("ddim", "rescaled"): DDIM,
    ("flow_euler", "CFG-Zero*"): FLOW,
    ("flow_euler", "APG"): FLOW,
}
GUIDANCE = {"plain": Guidance(W), "rescaled": Guidance(W, rescale=0.7), "CFG-Zero*": Guidance(W, zero_star=True),
            "APG": Guidance(W, apg=APG(eta=0.5, threshold=20.0))}


def diffusers_mix(rule):
    """diffusers' own function of (conditional, null) for a rule."""
    if rule == "rescaled":
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
        return lambda cond, null: rescale_noise_cfg(null + W * (cond - null), cond, 0.7)
    if rule == "CFG-Zero*":
        from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

        def zero_star(cond, null):
            scaled = null * cfg_zero_star_scale(cond.flatten(1), null.flatten(1)).view(-1, 1, 1, 1)
            return scaled + W * (cond - scaled)
        return zero_star
    if rule == "APG":
        from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
        return lambda cond, null: normalized_guidance(cond, null, W - 1, None, 0.5, 20.0, use_original_formulation=True)
    return lambda cond, null: null + W * (cond - null)


def jobs(args, ceilings):
    """[(label, function returning rows)]; nothing without diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        return []
    found = [(name, rule, shape, f"{name}, {shape}, {rule}") for name, rule in CASES for shape in SHAPES]
    found = [each for each in found if args.case in each[-1]]
    return [(f"update {label}", functools.partial(rows, *case, label))
            for *case, label in (found[:1] if args.quick else found)]


@torch.no_grad()
def rows(name, rule, case, label):
    """One row: a guided update of this sampler in float32."""
    import diffusers

    from difuse.integrations.schedulers import from_diffusers

    shape, (cls, config, process, prediction, options) = SHAPES[case], CASES[name, rule]
    generator = torch.Generator().manual_seed(0)
    x, answers = torch.randn(shape, generator=generator), torch.randn(2 * shape[0], *shape[1:], generator=generator)
    null, cond = answers.chunk(2)  # diffusers' order
    began = time.perf_counter()
    program = SAMPLERS[name].program(process, STEPS, prediction, GUIDANCE[rule], **options)
    tables = program.tables("cpu")
    planned = time.perf_counter() - began

    def ours():
        run = Run(program, (x,), None, tables=tables)
        while run.advance() is not None:
            run.give((cond, null, cond))
        return run.x

    original = getattr(diffusers, cls)(**config)
    original.set_timesteps(STEPS)
    swapped, mix = from_diffusers(original), diffusers_mix(rule)

    def theirs(scheduler):
        def call():
            scheduler.set_timesteps(STEPS)
            sample = x
            for t in scheduler.timesteps:
                uncond, text = answers.chunk(2)
                sample = scheduler.step(mix(text, uncond), t, sample, return_dict=False)[0]
            return sample

        return call

    with use_backend("reference"):
        expected = ours()
    found = error(ours(), expected.double())
    row = {"group": "update", "op": "sampler update", "case": label, "dtype": "fp32",
           "pass": UPDATE, "shape": list(shape),
           "gate": verdict([("out", found, 1e-5, found <= 1e-5)]),
           "errors": {"difuse": found, "from_diffusers": error(theirs(swapped)(), theirs(original)().double())},
           "maps": sum(isinstance(each, Map) for each in program.instructions), "planned_seconds": planned}
    if row["gate"]["ok"]:
        speeds = versus({"difuse": ours, "eager": theirs(original), "from_diffusers": theirs(swapped)})
        for timing in speeds["times"].values():
            timing["seconds"] /= STEPS
        row |= speeds
        row["targets"] = [TARGET.judge(row)] if rule == "plain" else []
    return [row]
