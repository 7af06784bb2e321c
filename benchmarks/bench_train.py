"""One training step, forward to optimizer, against the plain PyTorch twin: float32, and bfloat16 by autocast."""
import copy

import torch
import torch.nn.functional as F

from benchmarks import bench_model, rivals
from benchmarks.bench_ops import DTYPES
from benchmarks.timing import versus

STEP = "training step"


def jobs(args, ceilings):
    """[(label, function returning rows)]: every family of bench_model."""
    return [(f"training {label}", job) for label, job in bench_model.jobs(args, ceilings, training_rows)]


def training_rows(family, dtype_name, ceilings, quick=False, compiles=False, skipped=None):
    """One row: mean squared error, backward, fused AdamW. The gate compares the loss and every gradient first."""
    model, case, inputs = bench_model.build(family, quick)
    row = {"group": "train", "op": family, "case": case, "dtype": dtype_name, "pass": STEP,
           "shape": list(inputs[0].shape)}
    if skipped:
        return [{**row, "skipped": skipped}]
    model.train()
    plain = rivals.PlainDiT.like(model)
    target = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    ours, eager, truth = (named_gradients(m, inputs, target, name) for m, name in (
        (model, dtype_name), (plain, dtype_name), (copy.deepcopy(plain).double(), "fp64")))
    row["gate"] = bench_model.gate(ours, eager, truth, DTYPES[dtype_name])
    if not row["gate"]["ok"]:
        return [row]
    contenders = {"difuse": stepper(model, inputs, target, dtype_name),
                  "eager": stepper(plain, inputs, target, dtype_name)}
    if compiles:
        rival = stepper(copy.deepcopy(plain), inputs, target, dtype_name, rivals.compiled)
        loss, seconds, why = rivals.first_call(rival)
        row |= {"compile_seconds": seconds} if why is None else {"compile_failed": why}
        if why is None:
            rivals.check_rival("compile", [loss], [eager["loss"]], DTYPES[dtype_name])
            contenders["compile"] = rival
    row |= versus(contenders) | {"targets": []}
    return [row | bench_model.against_ceilings(ceilings, dtype_name, model, inputs, row, training=True)]


def loss_of(network, inputs, target, dtype_name):
    """Mean squared error of one batch, under autocast for bf16."""
    x, t, y = inputs
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype_name == "bf16"):
        prediction = network(x, t, y)
    return F.mse_loss(prediction.to(target.dtype), target)


def named_gradients(network, inputs, target, dtype_name):
    """{"loss": ..., weight name: gradient}; "fp64" for the oracle. Gradients are flat: the twin has a convolution."""
    if dtype_name == "fp64":
        inputs, target = (inputs[0].double(), *inputs[1:]), target.double()
    names, parameters = zip(*network.named_parameters(), strict=True)
    loss = loss_of(network, inputs, target, dtype_name)
    gradients = torch.autograd.grad(loss, parameters)
    return {"loss": loss.detach()} | {n: g.flatten() for n, g in zip(names, gradients, strict=True)}


def stepper(network, inputs, target, dtype_name, compiler=None):
    """A function that takes one optimizer step on `network`, through `compiler(network)` if given; returns the loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    callable_network = network if compiler is None else compiler(network)

    def step():
        optimizer.zero_grad()
        loss = loss_of(callable_network, inputs, target, dtype_name)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
