"""Frozen models against the plain twin, torch.compile of it and, where it is installed, OpenVINO: forward, trajectory.

OpenVINO converts the plain twin itself; its 8 bits come from NNCF. Both 8-bit models are calibrated on the timed call.
A trajectory is a user's DDIM loop around a plain model or OpenVINO, and `difuse.sample` around ours.
"""
import math

import torch

import difuse
from benchmarks import bench_model, openvino_rival, rivals
from benchmarks.bench_model import FORWARD, GUIDANCE
from benchmarks.bench_ops import DTYPES, Target, verdict
from benchmarks.timing import versus
from difuse.diffusion import VP, initial_noise
from difuse.integrations.products import emulates_bfloat16
from difuse_kernels.testing.numerics import FACTOR

CASES = (("DiT-S/2", 8), ("DiT-XL/2", 1), ("DiT-XL/2", 2))  # family, batch of a forward
TRAJECTORIES = {("DiT-S/2", 8), ("DiT-XL/2", 2)}  # the batch is that of a guided step
TRAJECTORY, STEPS = "DDIM trajectory", 4
PROCESS = VP("linear")
PRECISIONS = ("fp32", "bf16", "int8")
# of a result, rms over rms: a few rounding steps of every product of the blocks
ERRORS = {"bf16": 0.05, "int8": 0.05}
WIDE = ("DiT-S/2", "DiT-XL/2")
TARGETS = (*(Target(WIDE, FORWARD, metric, value, (precision,)) for precision, metric, value in (
               ("fp32", "openvino", 1.05), ("fp32", "eager", 1.4), ("fp32", "compile", 1.35),
               ("bf16", "openvino", 1.05), ("bf16", "eager", 2.6), ("int8", "openvino", 1.0))),
           *(Target(("DiT-XL/2",), TRAJECTORY, "openvino", 1.08, (precision,)) for precision in PRECISIONS))


def jobs(args, ceilings):
    """[(label, function returning rows)]: every case whose family fits; 8 bits beside float32."""
    compiles = not (args.no_compile or args.quick)
    dtypes = args.dtype or (("fp32",) if emulates_bfloat16() else ("fp32", "bf16"))
    precisions = [name for name in PRECISIONS if name.replace("int8", "fp32") in dtypes]
    return [(f"frozen {family}, batch {batch}", lambda family=family, batch=batch: rows(
                family, batch, precisions, ceilings, args.quick, compiles))
            for family, batch in CASES if args.case in family and precisions]


def rows(family, batch, precisions, ceilings, quick=False, compiles=False):
    """A row per precision for the forward and, for some cases, one for a guided trajectory of half the batch."""
    model, case, inputs = bench_model.build(family, quick, batch)
    model.eval()
    noise, _ = initial_noise(inputs[0].shape[1:], range(len(inputs[0]) // 2 or 1))
    labels, trajectory = inputs[2][: len(noise)], (family, batch) in TRAJECTORIES or quick
    head = {"group": "frozen", "op": family}
    found = []
    with torch.no_grad():
        plain, exact = rivals.PlainDiT.like(model), rivals.PlainDiT.like(model).double()
        truth = exact(inputs[0].double(), *inputs[1:])
        image = users_ddim(exact, noise.double(), labels) if trajectory else None
        del exact  # of DiT-XL 5 GB
        compiled, extra = bench_model.compile_model(plain, inputs, compiles)
        plain_calls = {"eager": lambda: plain(*inputs)} | (
            {} if compiled is None else {"compile": lambda: compiled(*inputs)})
        for precision in precisions:
            frozen = difuse.freeze(model, precision, [inputs] if precision == "int8" else None)
            rival, why = (None, "a quick run") if quick else openvino_rival.build(plain, inputs, precision)
            row = {**head, **extra, "case": case, "pass": FORWARD, "dtype": precision, "openvino": why or "measured",
                   "shape": list(inputs[0].shape)}
            calls = {"difuse": lambda frozen=frozen: frozen(*inputs)} | plain_calls
            if rival is not None:
                calls["openvino"] = lambda rival=rival: rival(*inputs)
            found.append(judged(row, calls, truth, precision))
            if "times" not in found[-1]:  # 8 bits of a wrong model prove nothing either
                break
            if precision == "fp32":
                found[-1] |= bench_model.against_ceilings(ceilings, precision, model, inputs, found[-1])
            if not trajectory:
                continue
            row = {**head, "case": f"{len(noise)} images, {STEPS} steps, guidance {GUIDANCE}", "pass": TRAJECTORY,
                   "dtype": precision, "openvino": why or "measured", "shape": list(noise.shape)}
            calls = {"difuse": lambda frozen=frozen: difuse.sample(
                         frozen, labels, process=PROCESS, prediction="eps", steps=STEPS, guidance=GUIDANCE),
                     "eager": lambda: users_ddim(plain, noise, labels)}
            if rival is not None:
                calls["openvino"] = lambda rival=rival: users_ddim(rival, noise, labels, plain.num_classes)
            found.append(judged(row, calls, image, precision))
    return found


def users_ddim(model, x, labels, null=None):
    """DDIM with guidance around a plain model of eps, as users write it. null: the null class of a bare function."""
    t = PROCESS.num_steps - 1 - torch.arange(STEPS) * PROCESS.num_steps // STEPS
    alpha, sigma = (values.tolist() for values in PROCESS.alpha_sigma(t))
    y = torch.cat((labels, torch.full_like(labels, model.num_classes if null is None else null)))
    for i in range(STEPS):
        out = model(torch.cat((x, x)), t[i].expand(len(y)).float(), y)  # [2B,C,H,W]
        eps_cond, eps_null = out.chunk(2)  # each [B,C,H,W]
        eps = eps_null + GUIDANCE * (eps_cond - eps_null)
        x0 = (x - sigma[i] * eps) / alpha[i]
        x = alpha[i + 1] * x0 + sigma[i + 1] * eps if i + 1 < STEPS else x0
    return x


def judged(row, calls, truth, precision):
    """The row with every contender's error, the gate on ours and, where that is passed, times and targets."""
    size = truth.square().mean().sqrt().item()
    errors = {name: (call().double() - truth).square().mean().sqrt().item() / size for name, call in calls.items()}
    budget = ERRORS.get(precision, FACTOR * errors["eager"] + torch.finfo(DTYPES["fp32"]).eps)
    row["gate"] = verdict([("out", errors["difuse"], budget, errors["difuse"] <= budget)])
    row["errors"] = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    if row["gate"]["ok"]:
        row |= versus(calls)
        row["targets"] = [target.judge(row) for target in TARGETS if target.fits(row)]
    return row
