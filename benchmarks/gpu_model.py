"""DiT-XL/2 on the GPU: forward passes, a training step, guided sampling with CUDA graphs, each against its plain twin.

Times are those a user sees, the host's work included. Every pass is measured beside eager PyTorch first; a second job
measures all of it again beside torch.compile, whose first call takes minutes on a model of this size.
"""
import copy
import functools

import torch

import difuse
from benchmarks import bench_model, bench_train, rivals
from benchmarks.bench_model import GUIDANCE
from benchmarks.bench_ops import DTYPES, FORWARD
from benchmarks.gpu_device import QueuedClock
from benchmarks.gpu_plan import Job
from benchmarks.timing import versus
from difuse.diffusion import Flow
from difuse.diffusion.samplers import initial_noise
from difuse.models import DiT

FAMILY, DTYPE = "DiT-XL/2", "bf16"
SAMPLING = "guided sampling"
STEPS = 50
GATE_STEPS = 2  # from random weights a long path amplifies rounding, in whatever direction it took first
GATE_BATCH = 8  # of the training step's gradients, in float64
TINY = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2,
        "num_classes": 5, "class_dropout_prob": 0.0}


def jobs(device):
    """Forward, training, sampling: with eager PyTorch, and then each with torch.compile as well."""
    runs = [(f"forward {side} px, batch {batch}", forward_rows, (side, batch))
            for side, batch in ((512, 16), (256, 16), (512, 1), (256, 1))]
    runs.insert(1, ("training 256 px, batch 64", training_rows, (256, 64)))
    runs.insert(2, ("sampling 256 px, batch 1", sampling_rows, (256, 1)))
    if device.dry:
        runs = [(name, rows, (side, min(batch, 2))) for name, rows, (side, batch) in runs[:3]]
    found = [Job("model", f"model {name}", functools.partial(rows, device, *arguments), "model", least=20.0, cap=90.0)
             for name, rows, arguments in runs]
    return found + [Job("model", f"model {name}, compiled", functools.partial(rows, device, *arguments, compiles=True),
                        "compiled models", least=45.0, cap=200.0, may_be_cut=True)
                    for name, rows, arguments in runs[:4] if not (device.dry and rows is sampling_rows)]


def build(device, side):
    """The model for images of side x side pixels, float32, every weight random."""
    with torch.device(device.name):
        model = DiT(**TINY) if device.dry else DiT.from_name(FAMILY, input_size=side // 8, class_dropout_prob=0.0)
    generator = torch.Generator(device.name).manual_seed(0)
    bench_model.random_weights(model, generator)
    return model, generator


def head(side, batch, name):
    """What every row of this file begins with."""
    return {"group": "model", "op": f"{FAMILY} {side} px", "case": f"batch {batch}", "dtype": DTYPE, "pass": name,
            "backend": "auto"}


def options(device):
    """For timing.interleaved: device time as users wait for it."""
    return device.timing(11, 5e-3, QueuedClock(device, ahead=False))


def forward_rows(device, side, batch, compiles=False):
    """One row: a forward pass, weights in bfloat16."""
    model, generator = build(device, side)
    dtype, row = DTYPES[DTYPE], head(side, batch, FORWARD)
    x, t, y = bench_model.random_inputs(model, batch, generator)
    model, x = model.eval().to(dtype), x.to(dtype)
    plain = rivals.PlainDiT.like(model)
    with torch.no_grad():
        calls = {"difuse": lambda: model(x, t, y), "eager": lambda: plain(x, t, y)}
        compiled, extra = bench_model.compile_model(plain, (x, t, y), compiles, **device.compile_models)
        if compiled is not None:
            calls["compile"] = lambda: compiled(x, t, y)
        truth = copy.deepcopy(plain).double()(x.double(), t, y)
        row |= {"shape": list(x.shape)} | extra | bench_model.race(calls, truth, dtype, **options(device))
        row["memory"] = {name: device.peak_bytes(call) for name, call in calls.items()}
        row["bytes"], row["flops"] = work(model, (x, t, y), 1)
    yield row


def training_rows(device, side, batch, compiles=False):
    """One row: forward under autocast, backward, fused AdamW, on float32 weights; memory beyond weights and moments."""
    model, generator = build(device, side)
    row, dtype = head(side, batch, bench_train.STEP), DTYPES[DTYPE]
    inputs = bench_model.random_inputs(model.train(), batch, generator)
    target = torch.randn(inputs[0].shape, generator=generator, device=device.name)
    plain = rivals.PlainDiT.like(model)
    few = [value[:GATE_BATCH] for value in (*inputs, target)]
    ours, eager, truth = (bench_train.named_gradients(m, few[:3], few[3], name) for m, name in (
        (model, DTYPE), (plain, DTYPE), (copy.deepcopy(plain).double(), "fp64")))
    row |= {"shape": list(inputs[0].shape), "gate": bench_model.gate(ours, eager, truth, dtype)}
    del ours, eager, truth
    device.release()
    if not row["gate"]["ok"]:
        yield row
        return
    networks = {"difuse": model, "eager": plain}
    steps = {name: bench_train.stepper(network, inputs, target, DTYPE) for name, network in networks.items()}
    if compiles:
        networks["compile"] = copy.deepcopy(plain)
        compiler = functools.partial(rivals.compiled, **device.compile_models)
        step = bench_train.stepper(networks["compile"], inputs, target, DTYPE, compiler)
        loss, seconds, why = rivals.first_call(step)
        row |= {"compile_seconds": seconds} if why is None else {"refused": {"compile": why}}
        if why is None:
            rivals.check_rival("compile", [loss], [steps["eager"]()], dtype)
            steps["compile"] = step
    row |= versus(steps, **options(device))
    row["memory"] = {}
    for name, step in steps.items():
        networks[name].zero_grad(set_to_none=True)  # gradients belong to the step
        row["memory"][name] = device.peak_bytes(step)
    row["bytes"], row["flops"] = work(model, inputs, GATE_BATCH, training=True)
    yield row


def work(model, inputs, few, training=False):
    """bench_model.work counted on the first `few` samples: the reference path holds every logit of attention."""
    total_bytes, flops = bench_model.work(model, [value[:few] for value in inputs], training)
    return total_bytes, flops * len(inputs[0]) // min(few, len(inputs[0]))


def sampling_rows(device, side, batch, compiles=False):
    """One row: guided Euler sampling through difuse.sample, with CUDA graphs and without, beside the users' loop."""
    model, _ = build(device, side)
    dtype, row = DTYPES[DTYPE], head(side, batch, SAMPLING)
    model = model.eval().to(dtype)
    plain = rivals.PlainDiT.like(model)
    labels = torch.arange(batch, device=device.name) % model.num_classes
    shape = (model.config["in_channels"], *(model.config["input_size"],) * 2)
    noise, _ = initial_noise(shape, range(batch), device.name)
    all_steps = 4 if device.dry else STEPS

    def ours(steps=all_steps, **more):
        return difuse.sample(model, labels, process=Flow(), prediction="flow", sampler="flow_euler", steps=steps,
                             guidance=GUIDANCE, **more)

    def users(network, dtype=dtype, steps=all_steps):
        x = noise.to(torch.promote_types(noise.dtype, dtype))
        for i in range(steps):
            x = x - bench_model.users_velocity(network, x, 1 - i / steps, labels, dtype) / steps
        return x

    with torch.no_grad():
        exact = copy.deepcopy(plain).double()
        row["gate"] = bench_model.gate(*({"out": out} for out in (
            ours(GATE_STEPS), users(plain, steps=GATE_STEPS), users(exact, torch.float64, GATE_STEPS))), noise.dtype)
        row |= {"shape": list(noise.shape), "case": f"{row['case']}, {all_steps} steps, guidance {GUIDANCE}"}
        if not row["gate"]["ok"]:
            yield row
            return
        del exact
        contenders = {"eager": lambda: users(plain), "no graphs": ours}
        contenders["difuse"] = functools.partial(ours, graphs=difuse.Graphs())
        off = rivals.difference([contenders["difuse"]()], [ours()])
        if not off <= torch.finfo(dtype).eps:
            yield row | {"gate": {"ok": False, "worst": "samples with graphs against those without",
                                  "error": off if off == off else None, "budget": torch.finfo(dtype).eps}}
            return
        if compiles:
            compiled = rivals.compiled(plain, **device.compile_models)
            contenders["compile"] = lambda: users(compiled)
            _, row["compile_seconds"], why = rivals.first_call(contenders["compile"])
            if why is not None:
                del contenders["compile"], row["compile_seconds"]
                row["refused"] = {"compile": why}
        row |= versus(contenders, **options(device))
        row["memory"] = {name: device.peak_bytes(call) for name, call in contenders.items()
                         if name != "difuse"}  # a graph's memory is its own: a replay seems to need none
    yield row
