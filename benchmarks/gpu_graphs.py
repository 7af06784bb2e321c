"""CUDA graphs: a whole guided loop, difuse.sample's steps, a frozen model, replayed with other numbers, against eager.

What changes between replays lies in buffers on the device: state, times, coefficients, labels, and the (seed, step)
pairs that the kernel draws noise from. A kernel that read any of them on the host would replay the recorded ones.
"""
import functools

import torch

import difuse
from benchmarks import bench_model
from benchmarks.bench_model import GUIDANCE
from benchmarks.gpu_plan import Job
from benchmarks.rivals import difference
from difuse.diffusion import VP, Flow
from difuse.inference import freeze
from difuse.models import DiT
from difuse_kernels import sampler_step

STEPS, BATCH = 3, 2
SIZES = {"input_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 144, "depth": 2, "num_heads": 2,
         "num_classes": 10, "class_dropout_prob": 0.0}  # head dimension 72, as DiT-XL's
WHOLE, SAMPLE, FROZEN = "whole loop in one graph", "difuse.sample with graphs", "difuse.freeze"


def jobs(device):
    """All kinds of recording."""
    return [Job("graphs", f"graphs {name}", functools.partial(rows, device), "graphs", cap=90)
            for name, rows in ((WHOLE, whole_loop), (SAMPLE, sample_rows), (FROZEN, frozen_rows))]


def build(device, dtype):
    """A small DiT with random weights."""
    with torch.device(device.name):
        model = DiT(**SIZES)
    bench_model.random_weights(model, torch.Generator(device.name).manual_seed(0))
    return model.eval().to(dtype)


class Loop:
    """STEPS ancestral steps with guidance on static buffers; `numbers(seed)` fills them, `run()` reads them."""

    def __init__(self, model, device):
        shape = (BATCH, *(SIZES[name] for name in ("in_channels", "input_size", "input_size")))
        self.model = model
        self.x = torch.zeros(shape, device=device.name)
        self.times = torch.zeros(STEPS, device=device.name)
        self.labels = torch.zeros(2 * BATCH, dtype=torch.int64, device=device.name)
        self.coefficients = torch.zeros(STEPS, 1, 4, device=device.name)  # state, conditional, null, noise
        self.noise = torch.zeros(STEPS, BATCH, 2, dtype=torch.int64, device=device.name)

    def numbers(self, seed):
        """Other values everywhere, in place."""
        g = torch.Generator().manual_seed(seed)
        self.x.copy_(torch.randn(self.x.shape, generator=g))
        self.times.copy_(1000 * torch.rand(STEPS, generator=g))
        self.labels.copy_(torch.randint(0, SIZES["num_classes"] + 1, (2 * BATCH,), generator=g))
        self.coefficients.copy_(torch.randn(self.coefficients.shape, generator=g))
        self.noise.copy_(torch.randint(-(2**62), 2**62, self.noise.shape, generator=g))

    def run(self):
        """The last state, in a tuple."""
        x = self.x
        for step in range(STEPS):
            out = self.model(torch.cat((x, x)), self.times[step].expand(2 * BATCH), self.labels)  # [2B,C,H,W]
            (x,) = sampler_step((x, *out.chunk(2)), self.coefficients[step], noise=self.noise[step],
                                out_dtypes=(torch.float32,))
        return (x,)


def whole_loop(device):
    """A row per dtype: one capture, replayed with three sets of numbers."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        loop, pairs = Loop(build(device, dtype), device), []
        with torch.no_grad():
            loop.numbers(0)
            replay, results = device.capture(loop.run)
            for seed in (0, 1, 2):
                loop.numbers(seed)
                replay()
                replayed = results[0].clone()
                pairs.append((replayed, loop.run()[0].clone()))
        yield row(WHOLE, f"{STEPS} guided ancestral steps", name, dtype, pairs)


def sample_rows(device):
    """A row per sampler: difuse.sample with graphs and without, other seeds and labels at the second and third call."""
    model = build(device, torch.bfloat16)
    for sampler, process, prediction in (("ddpm", VP(), "eps"), ("ddim", VP(), "v"), ("flow_euler", Flow(), "flow")):
        graphs, pairs = difuse.Graphs(), []
        for seed in (0, 10, 20):
            call = functools.partial(
                difuse.sample, model, [seed % 7, 3], process=process, prediction=prediction, sampler=sampler,
                steps=2 * STEPS, guidance=GUIDANCE + seed / 10, seeds=[seed, seed + 1])
            pairs.append((call(graphs=graphs), call()))
        yield row(SAMPLE, sampler, "bf16", torch.bfloat16, pairs)


@torch.no_grad()
def frozen_rows(device):
    """A row per dtype: the frozen model called with three sets of inputs."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model, pairs = build(device, dtype), []
        frozen = freeze.record(model)  # what difuse.freeze does on a GPU
        for seed in (0, 1, 2):
            x, t, y = bench_model.random_inputs(model, BATCH, torch.Generator(device.name).manual_seed(seed))
            pairs.append((frozen(x.to(dtype), t, y), model(x.to(dtype), t, y)))
        yield row(FROZEN, "DiT", name, dtype, pairs)


def row(what, case, dtype_name, dtype, pairs):
    """The row of (replayed, eager) pairs: right if no pair differs by more than rounding, and no two runs are equal."""
    off = max(difference([ours], [eager]) for ours, eager in pairs)
    stale = any(torch.equal(pairs[0][0], ours) for ours, _ in pairs[1:])
    budget = 32 * torch.finfo(dtype).eps  # should a product take another algorithm while it is recorded
    ok = bool(off <= budget) and not stale
    worst = "a replay ignored its new numbers" if stale else "replays against eager"
    return {"group": "graphs", "op": what, "case": case, "dtype": dtype_name, "pass": f"{len(pairs)} replays",
            "same_bits": all(torch.equal(*pair) for pair in pairs),
            "gate": {"ok": ok, "worst": worst, "error": off if off == off else None, "budget": budget}}
