"""Frozen models against the plain twin, torch.compile of it and other engines that are installed: forward, trajectory.

8-bit models are calibrated on the timed call, ours and OpenVINO's. A trajectory is a user's DDIM loop around a plain
model or another engine, and `difuse.sample` around ours.
"""
import copy
import math

import torch

import difuse
from benchmarks import bench_model, converted_rivals, rivals
from benchmarks.bench_model import FORWARD, GUIDANCE, NO_BF16
from benchmarks.bench_ops import Target, verdict
from benchmarks.timing import versus
from difuse.diffusion import VP, initial_noise
from difuse.inference.packed import multiplies_bfloat16
from difuse_kernels.testing.numerics import FACTOR

CASES = (("DiT-S/2", 8), ("DiT-XL/2", 1), ("DiT-XL/2", 2))  # family, batch of a forward
TRAJECTORIES = {("DiT-S/2", 8), ("DiT-XL/2", 2)}  # the batch is that of a guided step
TRAJECTORY, STEPS = "DDIM trajectory", 4
PROCESS = VP("linear")
PRECISIONS = ("fp32", "bf16", "int8")
PAUSE = 0.2  # seconds, see benchmarks.timing
INT8_ERROR = 0.05  # of a result, rms over rms: a few rounding steps of every product of the blocks
WIDE = ("DiT-S/2", "DiT-XL/2")
TARGETS = (*(Target(WIDE, FORWARD, metric, value, (precision,)) for precision, metric, value in (
               ("fp32", "openvino", 1.05), ("fp32", "eager", 1.4), ("fp32", "compile", 1.35),
               ("bf16", "openvino", 1.05), ("bf16", "eager", 2.6), ("int8", "openvino", 1.0))),
           *(Target(("DiT-XL/2",), TRAJECTORY, "openvino", 1.08, (precision,)) for precision in PRECISIONS))


def jobs(args, ceilings):
    """[(label, function returning rows)]: every case whose family fits; 8 bits beside float32."""
    compiles = not (args.no_compile or args.quick)
    precisions = [name for name in PRECISIONS if name.replace("int8", "fp32") in (args.dtype or PRECISIONS)]
    skipped = {"bf16": NO_BF16} if args.dtype is None and not multiplies_bfloat16() else {}
    cases = dict(CASES).items() if args.quick else CASES  # a quick model has a batch of its own
    return [(f"frozen {family}, batch {batch}", lambda family=family, batch=batch: rows(
                family, batch, precisions, ceilings, args.quick, compiles, skipped))
            for family, batch in cases if args.case in family and precisions]


def rows(family, batch, precisions, ceilings, quick=False, compiles=False, skipped=()):
    """A row per precision for the forward and, for some cases, one for a guided trajectory of half the batch.

    skipped: {precision: why it is not measured}.
    """
    model, case, inputs = bench_model.build(family, quick, batch)
    model.eval()
    noise, _ = initial_noise(inputs[0].shape[1:], range(len(inputs[0]) // 2 or 1))
    labels, trajectory = inputs[2][: len(noise)], (family, batch) in TRAJECTORIES or quick
    head, null, found = {"group": "frozen", "op": family}, model.num_classes, []
    with torch.no_grad():
        plain, exact = rivals.PlainDiT.like(model), rivals.PlainDiT.like(model).double()
        truth = exact(inputs[0].double(), *inputs[1:])
        image = users_ddim(exact, noise.double(), labels, null) if trajectory else None
        del exact  # of DiT-XL 5 GB
        compiled, extra = bench_model.compile_model(plain, inputs, compiles)
        plain_calls = {"eager": lambda: plain(*inputs)} | (
            {} if compiled is None else {"compile": lambda: compiled(*inputs)})
        for precision in precisions:
            frozen = engines = calls = None  # the last ones make room
            row = {**head, **extra, "case": case, "pass": FORWARD, "dtype": precision, "shape": list(inputs[0].shape)}
            if precision in skipped:
                found.append(row | {"skipped": skipped[precision]})
                continue
            frozen = difuse.freeze(model, precision, [inputs] if precision == "int8" else None)
            engines, row["engines"] = {}, {}
            for name in converted_rivals.RIVALS:
                engine, why = (None, "a quick run") if quick else converted_rivals.build(name, plain, inputs, precision)
                row["engines"][name] = why or "measured"
                if engine is not None:
                    engines[name] = engine
            calls = {"difuse": lambda frozen=frozen: frozen(*inputs)} | plain_calls | {
                name: lambda engine=engine: engine(*inputs) for name, engine in engines.items()}
            half = in_bfloat16(plain) if precision == "bf16" else None
            found.append(judged(row, calls, truth, half and half(*inputs)))
            if "times" not in found[-1]:  # 8 bits of a wrong model prove nothing either
                break
            if precision == "fp32":
                found[-1] |= bench_model.against_ceilings(ceilings, precision, model, inputs, found[-1])
            if not trajectory:
                continue
            row = {**head, "case": f"{len(noise)} images, {STEPS} steps, guidance {GUIDANCE}", "pass": TRAJECTORY,
                   "dtype": precision, "engines": row["engines"], "shape": list(noise.shape)}
            calls = {"difuse": lambda frozen=frozen: difuse.sample(
                         frozen, labels, process=PROCESS, prediction="eps", steps=STEPS, guidance=GUIDANCE),
                     "eager": lambda: users_ddim(plain, noise, labels, null)} | {
                name: lambda engine=engine: users_ddim(engine, noise, labels, null)
                for name, engine in engines.items()}
            found.append(judged(row, calls, image, half and users_ddim(half, noise, labels, null)))
    return found


def in_bfloat16(plain):
    """A function like the plain model, which rounds weights and everything else to bfloat16."""
    model = copy.deepcopy(plain).bfloat16()
    return lambda x, t, y: model(x.bfloat16(), t, y).float()


def error(found, truth):
    """rms over rms."""
    return ((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def users_ddim(model, x, labels, null):
    """DDIM with guidance around a plain model of eps, as users write it. null: the class that stands for none."""
    t = PROCESS.num_steps - 1 - torch.arange(STEPS) * PROCESS.num_steps // STEPS
    alpha, sigma = (values.tolist() for values in PROCESS.alpha_sigma(t))
    y = torch.cat((labels, torch.full_like(labels, null)))
    for i in range(STEPS):
        out = model(torch.cat((x, x)), t[i].expand(len(y)).float(), y)  # [2B,C,H,W]
        eps_cond, eps_null = out.chunk(2)  # each [B,C,H,W]
        eps = eps_null + GUIDANCE * (eps_cond - eps_null)
        x0 = (x - sigma[i] * eps) / alpha[i]
        x = alpha[i + 1] * x0 + sigma[i + 1] * eps if i + 1 < STEPS else x0
    return x


def judged(row, calls, truth, half=None):
    """The row with every contender's error, the gate on ours and, where that is passed, times and targets.

    half: eager's result in bfloat16, by which a bfloat16 row is judged; eager has no 8 bits, whose bound is set.
    """
    errors = {name: error(call(), truth) for name, call in calls.items()}
    least = errors["eager"] if half is None else error(half, truth)
    rounding = torch.finfo(torch.float32 if half is None else torch.bfloat16).eps
    allowed = INT8_ERROR if row["dtype"] == "int8" else FACTOR * least + rounding
    row["gate"] = verdict([("out", errors["difuse"], allowed, errors["difuse"] <= allowed)])
    row["errors"] = {name: value if math.isfinite(value) else None for name, value in errors.items()}
    if row["gate"]["ok"]:
        row |= versus(calls, pause=PAUSE)
        row["targets"] = [target.judge(row) for target in TARGETS if target.fits(row)]
    return row
