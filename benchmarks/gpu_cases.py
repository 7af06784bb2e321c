"""What the hardware suite measures and checks beyond the ops' own `speed` cases: calls as large as one GPU is given."""
import dataclasses

import torch

from benchmarks.kernel_report_cases import CALLS
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.case import Case

PRODUCTION = (  # op, name in kernel_report_cases; a tensor of each is some 20 to 50 million elements
    ("gate_residual_norm_modulate", "DiT-XL/2 512"), ("norm_modulate", "DiT-XL/2 512"),
    ("gate_residual", "DiT-XL/2 512"), ("attention_packed", "DiT-XL/2 512"), ("attention_packed", "DiT-XL/2 256"),
    ("attention", "Flux 1024"), ("qk_norm_rope", "Flux 1024, single"), ("qk_norm_rope_joint", "Flux 1024"),
    ("gated_activation", "Flux.2 klein 1024"), ("gated_activation", "SDXL 1024"), ("patchify", "Wan 480p"),
    ("unpatchify", "Wan 480p"), ("norm_modulate", "SD3.5-L 1024"), ("attention_packed", "PixArt 1024"),
    ("norm_modulate_dual", "SD3.5-M 1024"), ("group_norm_act", "SDXL 1024"),
    ("group_norm_act", "SDXL 1024, channels_last"),
)
BATCHES = (("patchify", "DiT-XL/2 512, batch 2048", lambda make: ((make("x", 2048, 4, 64, 64), 2), {"order": "cpq"})),
           ("unpatchify", "DiT-XL/2 512, batch 2048",
            lambda make: ((make("tokens", 2048, 1024, 32), 2, (32, 32)), {"order": "pqc"})),
           ("gram", "DiT-XL/2 512, rescaled, batch 2048",
            lambda make: ((make("out", 4096, 8, 64, 64)[:, :4].chunk(2),), {})))


def on_gpus(cases):
    """Those whose op has a kernel for GPUs; the others are torch's there."""
    return [case for case in cases if {"cuda", "triton"} & set(OPS[case.op].backends)]


def production():
    """The production calls of one dtype, bfloat16, as cases; ops that move little on any model with a large batch."""
    calls = {(call.op, call.name): call for call in CALLS if call.dtype == "bf16"}
    found = [_case(calls[key]) for key in PRODUCTION]
    guided = _guided(2048)
    return found + [Case(op, name, build, "a large batch", speed=True) for op, name, build in (*BATCHES, guided)]


def _guided(batch):
    def build(make):  # DDIM with guidance, the learned variance left out
        cond, uncond = make("out", 2 * batch, 8, 64, 64)[:, :4].chunk(2)
        table = make.constant(torch.tensor([[0.9, 0.3, -0.2]]), batched=False)
        return ([make("x", batch, 4, 64, 64), cond, uncond], table), {}
    return "sampler_step", f"DDIM guided, batch {batch}", build


def _case(call):
    """A call of the kernel report as a case: its tensors get names and numbers. Tables of angles are no rotations."""
    def build(make):
        count = iter(range(1000))

        def take(*shape, dtype=None, grad=True):
            return make(f"t{next(count)}", *shape, dtype=dtype, grad=grad)

        return call.build(take)

    return Case(call.op, call.name, build, "production", speed=True)


def drawn_once(case, device):
    """The same case with its numbers drawn on the device, once: every build gets copies of them.

    On a CPU, tens of millions of normal numbers take a second per tensor, and a case is built once per contender.
    """
    values, generator = {}, torch.Generator(device).manual_seed(0)

    def build(make):
        def take(name, *shape, dtype=None, scale=1.0, mean=0.0, batched=True, grad=True):
            dtype = dtype or make.dtype
            if (name, dtype) not in values:
                drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * scale + mean
                values[name, dtype] = drawn.to(dtype)
            leaf = values[name, dtype].to(make.work or dtype, copy=True).requires_grad_(grad)
            make.leaves[name] = leaf
            if not batched:
                make.shared.add(name)
            return leaf

        take.constant, take.work, take.dtype = make.constant, make.work, make.dtype
        return case.build(take)

    return dataclasses.replace(case, build=build)
