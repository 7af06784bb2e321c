"""difuse.Engine on a frozen model against the same requests one at a time: by that model, and by the plain twin."""
import torch

import difuse
from benchmarks import bench_model, rivals
from benchmarks.bench_frozen import PAUSE
from benchmarks.bench_ops import DTYPES, Target
from difuse.diffusion import SAMPLERS, VP, initial_noise
from difuse.inference.engine import Engine
from difuse.inference.requests import Request
from difuse_kernels import use_backend

SERVING = "serving"
ROWS = 16  # of one model call
PROCESS, PREDICTION = VP("linear"), "eps"
TARGET = Target((), SERVING, "alone", 1.5)


def jobs(args, ceilings):
    """[(label, function returning rows)]: every family of bench_model."""
    return [(f"serving {label}", job) for label, job in bench_model.jobs(args, ceilings, serving_rows)]


def mixed_requests(model, count):
    """Requests that agree in nothing: one to three steps of two samplers, every other one guided."""
    return [Request(i % model.num_classes, i, ("ddim", "ddpm")[i // 2 % 2], 1 + i % 3, (1.0, 1.5)[i % 2])
            for i in range(count)]


def one_at_a_time(model, requests, shape):
    """The requests' images by `model`, each in a batch of its own."""
    images = []
    for request in requests:
        noise, generators = initial_noise(shape, [request.seed])
        images.append(SAMPLERS[request.sampler](
            model, noise, process=PROCESS, steps=request.steps, prediction=PREDICTION, generators=generators,
            labels=torch.tensor([request.label]), guidance=request.guidance))
    return torch.cat(images)  # [N,C,H,W]


class InDtype:
    """A plain model that takes a sampler's float32 states; difuse's converts them itself."""

    def __init__(self, model, dtype):
        self.model, self.dtype, self.num_classes = model.to(dtype), dtype, model.num_classes

    def __call__(self, x, t, y):
        return self.model(x.to(self.dtype), t, y)


def serving_rows(family, dtype_name, ceilings, quick=False, compiles=False, skipped=None):
    """One row: the time until all images of mixed requests are there, submitted at once."""
    model, _, _ = bench_model.build(family, quick)
    requests, dtype = mixed_requests(model, 4 if quick else ROWS), DTYPES[dtype_name]
    shape = model.config["in_channels"], *2 * [model.config["input_size"]]
    row = {"group": "engine", "op": family, "case": f"{len(requests)} mixed requests, eager's one by one",
           "dtype": dtype_name, "pass": SERVING, "shape": [len(requests), *shape]}
    if skipped:
        return [{**row, "skipped": skipped}]
    plain, exact = InDtype(rivals.PlainDiT.like(model), dtype), InDtype(rivals.PlainDiT.like(model), torch.float64)
    model = difuse.freeze(model.eval(), dtype_name)
    with Engine(model, process=PROCESS, prediction=PREDICTION, max_batch=ROWS) as engine:
        contenders = {
            "difuse": lambda: torch.stack([f.result() for f in [engine.submit(request) for request in requests]]),
            "eager": lambda: one_at_a_time(plain, requests, shape),
            "alone": lambda: one_at_a_time(model, requests, shape)}
        with use_backend("reference"):
            truth = one_at_a_time(exact, requests, shape)
        row |= bench_model.race(contenders, truth, dtype, pause=PAUSE)
    if "times" in row:
        row["targets"] = [TARGET.judge(row)]
    return [row]
