"""Whole models against their plain PyTorch twin: a forward pass, and a guided sampling step."""
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import rivals, roofline
from benchmarks.bench_ops import DTYPES, FORWARD, verdict
from benchmarks.timing import versus
from difuse.diffusion import Flow, flow_euler
from difuse.integrations.products import emulates_bfloat16
from difuse.models import DiT
from difuse_kernels import use_backend
from difuse_kernels.testing.numerics import FACTOR

FAMILIES = {"DiT-S/2": DiT}  # name -> class with from_name and a plain twin in rivals.py
SAMPLING = "sampling step"
GUIDANCE = 1.5
NO_BF16 = "this CPU emulates bfloat16 products; --dtype bf16 measures them all the same"


def jobs(args, ceilings, rows=None):
    """[(label, function returning rows)]: every family in float32 and bfloat16. `rows` measures one of them."""
    rows = rows or model_rows
    compiles = not (args.no_compile or args.quick)
    chosen = []
    for family in FAMILIES:
        for dtype in args.dtype or ("fp32", "bf16"):
            if args.case in family and dtype != "fp16":
                why = NO_BF16 if dtype == "bf16" and args.dtype is None and emulates_bfloat16() else None
                chosen.append((f"{family} {dtype}", lambda family=family, dtype=dtype, why=why: rows(
                    family, dtype, ceilings, args.quick, compiles, why)))
    return chosen


def build(family, quick, batch=8):
    """(model, case name, (x, t, y)), float32. Random weights: adaLN-Zero's zeros would hide any mistake."""
    overrides = {"depth": 2, "input_size": 16} if quick else {}
    model = FAMILIES.get(family, DiT).from_name(family, class_dropout_prob=0.0, **overrides)
    generator, batch = torch.Generator().manual_seed(0), 2 if quick else batch
    random_weights(model, generator)
    x, t, y = random_inputs(model, batch, generator)
    depth = f", depth {model.config['depth']}" if quick else ""
    return model, f"batch {batch}, {'x'.join(map(str, x.shape[1:]))}{depth}", (x, t, y)


def random_weights(model, generator):
    """Every weight random, drawn where `generator` lives."""
    for parameter in model.parameters():
        scale = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, device=generator.device)


def random_inputs(model, batch, generator):
    """x [B,C,H,W] float32, t [B] and y [B] for one call of the model."""
    size, options = model.config["input_size"], {"generator": generator, "device": generator.device}
    x = torch.randn(batch, model.config["in_channels"], size, size, **options)
    t = torch.rand(batch, **options) * 1000
    return x, t, torch.randint(0, model.num_classes, (batch,), **options)


def model_rows(family, dtype_name, ceilings, quick=False, compiles=False, skipped=None):
    """A row for the forward pass, weights in the dtype, and one for a guided sampling step on half the batch.

    The step calls the model on as many rows as the forward pass; torch.compile is timed on the forward pass alone.
    """
    dtype = DTYPES[dtype_name]
    model, case, (x, t, y) = build(family, quick)
    head = {"group": "model", "op": family, "dtype": dtype_name}
    forward = {**head, "case": case, "pass": FORWARD, "shape": list(x.shape)}
    if skipped:
        return [{**forward, "skipped": skipped}]
    model, x = model.eval().to(dtype), x.to(dtype)
    plain, exact = rivals.PlainDiT.like(model), rivals.PlainDiT.like(model).double()
    noise, labels = x[: len(x) // 2].float(), y[: len(y) // 2]
    sampling = {**head, "case": f"{case.replace(f'batch {len(x)}', f'batch {len(noise)}')}, guidance {GUIDANCE}",
                "pass": SAMPLING, "shape": list(noise.shape)}

    def euler():
        return flow_euler(model, noise, process=Flow(), steps=1, prediction="flow", labels=labels, guidance=GUIDANCE)

    with torch.no_grad():
        compiled, extra = compile_model(plain, (x, t, y), compiles)
        calls = {"difuse": lambda: model(x, t, y), "eager": lambda: plain(x, t, y)}
        steps = {"difuse": euler, "eager": lambda: users_step(plain, noise, labels, dtype)}
        if compiled is not None:
            calls["compile"] = lambda: compiled(x, t, y)
        truth = exact(x.double(), t, y)
        forward |= race(calls, truth, dtype) | extra
        sampling |= race(steps, users_step(exact, noise.double(), labels, torch.float64), dtype)
    if "times" in forward:
        forward |= against_ceilings(ceilings, dtype_name, model, (x, t, y), forward)
    return [forward, sampling]


def users_step(model, x, labels, dtype):
    """Euler's method from t = 1 to 0 in one guided step, as users write it around a plain model."""
    return x - users_velocity(model, x, 1.0, labels, dtype)


def users_velocity(model, x, t, labels, dtype):
    """The guided velocity at time t in [0,1] of a plain model, as users write it."""
    y = torch.cat((labels, torch.full_like(labels, model.num_classes)))
    times = torch.full((2 * len(x),), 1000 * t, device=x.device)
    v = model(torch.cat((x, x)).to(dtype), times, y)  # [2B,C,H,W]
    v_cond, v_null = v.chunk(2)  # each [B,C,H,W]
    return v_null + GUIDANCE * (v_cond - v_null)


def race(contenders, truth, dtype, **options):
    """Gate first, then times: the part of a row that holds both. options: of timing.interleaved."""
    results = {name: call() for name, call in contenders.items()}
    if "compile" in results:
        rivals.check_rival("compile", [results["compile"]], [results["eager"]], dtype)
    found = {"gate": gate({"out": results["difuse"]}, {"out": results["eager"]}, {"out": truth}, dtype)}
    return found | versus(contenders, **options) | {"targets": []} if found["gate"]["ok"] else found


def gate(ours, eager, truth, dtype):
    """{ok, worst, error, budget} as for the ops, by rms per tensor: 1.5 times eager's error, plus one rounding."""
    found = []
    for name, exact in truth.items():
        size, our_error, eager_error = (value.square().mean().sqrt().item() for value in (
            exact, ours[name].double() - exact, eager[name].double() - exact))
        budget = FACTOR * eager_error + torch.finfo(dtype).eps * size
        found.append((name, our_error, budget, size > 0 and our_error <= budget))
    return verdict(found)


def compile_model(plain, inputs, wanted, **options):
    """(compiled model or None, what the row says about compiling it); options: of torch.compile."""
    if not wanted:
        return None, {}
    model = rivals.compiled(plain, **options)
    _, seconds, why = rivals.first_call(lambda: model(*inputs))
    return (model, {"compile_seconds": seconds}) if why is None else (None, {"compile_failed": why})


def against_ceilings(ceilings, dtype_name, model, inputs, row, training=False):
    """The row's part that compares it with the ceilings."""
    return roofline.against(ceilings, dtype_name, *work(model, inputs, training), row["times"]["difuse"]["seconds"])


def work(model, inputs, training=False):
    """(bytes, FLOPs): FLOPs of the matrix products, counted on the reference path; bytes of the weights alone.

    A training step reads the weights in both passes and writes gradients; AdamW reads weights, gradients and two
    moments, and writes all but the gradients: 10 times the weights.
    """
    with use_backend("reference"), torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        out = model(*inputs)
        if training:
            torch.autograd.grad(out.sum(), list(model.parameters()))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights * (10 if training else 1), counter.get_total_flops()
