"""The calls that the kernel report compiles for: every op at the shapes of the models that people run.

Sizes are the models' own (heads, head dimension, width, tokens, element order); batches are what one GPU is given.
Tensors lie on the "meta" device: shapes, strides and dtypes as in production, no memory.
"""
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch

import difuse_kernels
from benchmarks import roofline
from difuse_kernels import triton_launch
from difuse_kernels.dispatch import OPS, Op
from difuse_kernels.qk_norm_rope.qk_norm_rope import Stream

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INFERENCE, FORWARD, BACKWARD = "inference", "forward", "backward"  # `forward` also saves what `backward` needs


@dataclass(frozen=True)
class Call:
    """One call of a public op: `build(make)` returns (args, kwargs).

    `quick` calls are the smallest set that still launches every kernel; `training` calls run both ways.
    """

    op: str
    name: str
    build: Callable
    dtype: str = "bf16"
    training: bool = True
    quick: bool = False


class Make:
    """make(*shape) is a tensor without memory, in the call's dtype; those that take a gradient are in `leaves`."""

    def __init__(self, dtype):
        self.dtype, self.leaves = dtype, []

    def __call__(self, *shape, dtype=None, grad=True):
        tensor = torch.empty(shape, dtype=dtype or self.dtype, device="meta", requires_grad=grad)
        if grad:
            self.leaves.append(tensor)
        return tensor


class Recorded:
    """What one call launched: `launches` by pass, and the tensors that its bytes and FLOPs are counted from.

    A quick record leaves inference out where there is a forward pass, which is the same and saves a little more.
    """

    def __init__(self, call, target, quick=False):
        self.op, make = call.op, Make(DTYPES[call.dtype])
        self.args, self.kwargs = call.build(make)
        op = getattr(difuse_kernels, call.op)
        self.launches = {}
        with mock.patch.object(Op, "select", _select):
            if not (quick and call.training):
                with torch.no_grad():
                    self._record(INFERENCE, target, lambda: op(*self.args, **self.kwargs))
            if call.training:
                outputs = self._record(FORWARD, target, lambda: op(*self.args, **self.kwargs))
                self._record(BACKWARD, target, lambda: torch.autograd.grad(
                    outputs, make.leaves, [torch.empty_like(output) for output in outputs], allow_unused=True))

    def _record(self, name, target, run):
        with triton_launch.recording(target) as launches:
            results = run()
        self.launches[name] = launches
        if name != BACKWARD:
            results = results if isinstance(results, tuple) else (results,)
            self.outputs = [output for output in results if output is not None]
        return self.outputs

    def work(self, backward):
        """(bytes, FLOPs) of one forward pass, or of forward and backward, each tensor read or written once."""
        return roofline.work(self.op, self.args, self.kwargs, self.outputs, backward)


def _select(op, _requested, inputs):
    """In place of dispatch, which would refuse the meta device: the Triton kernels, or why the op refuses the rest."""
    implementation = op.implementation("triton")
    reason = implementation.unsupported(op.name, inputs)
    if reason:
        raise RuntimeError(f"{op.name}: the Triton kernels refuse a production call: {reason}")
    return implementation


def written():
    """The names of the ops that have Triton kernels."""
    return [name for name, op in OPS.items() if importlib.util.find_spec(f"{op.stem}_triton")]


def _packed(B, S, H, Dh, **options):
    def build(make):  # the output of one projection
        kwargs = {name: make(*shape, dtype=dtype, grad=False) for name, (shape, dtype) in options.items()}
        return (make(B, S, 3, H, Dh),), kwargs
    return build


def _joint_attention(B, S, H, Dh, **options):
    def build(make):  # qk_norm_rope has joined the streams
        kwargs = {name: make(*shape, dtype=dtype, grad=False) for name, (shape, dtype) in options.items()}
        return tuple(make(B, S, H, Dh) for _ in range(3)), kwargs
    return build


def _cross_attention(B, Sq, Sk, H, Dh):
    def build(make):
        k, v = make(B, Sk, 2, H, Dh).unbind(2)
        return (make(B, Sq, H, Dh), k, v), dict(key_bias=make(B, Sk, grad=False))
    return build


ATTENTION = [
    *[Call("attention_packed", f"{name} 256", _packed(64, 256, H, Dh), quick=Dh == 72) for name, H, Dh in (
        ("DiT-S/2", 6, 64), ("DiT-B/2", 12, 64), ("DiT-L/2", 16, 64), ("DiT-XL/2", 16, 72))],
    *[Call("attention_packed", "DiT-XL/2 256", _packed(64, 256, 16, 72), dtype) for dtype in ("fp16", "fp32")],
    Call("attention_packed", "DiT-XL/2 512", _packed(32, 1024, 16, 72)),
    Call("attention_packed", "PixArt 1024", _packed(4, 4096, 16, 72)),
    Call("attention", "PixArt 1024 cross", _cross_attention(4, 4096, 300, 16, 72), quick=True),
    Call("attention", "SD3.5-M 1024", _joint_attention(4, 4096 + 333, 24, 64)),
    Call("attention", "SD3.5-L 1024", _joint_attention(4, 4096 + 333, 38, 64)),
    Call("attention", "Flux 1024", _joint_attention(2, 4096 + 512, 24, 128), quick=True),
    Call("attention", "Qwen-Image, padded", _joint_attention(2, 4096 + 1024, 24, 128, kv_lengths=((2,), torch.int32))),
    Call("attention", "Wan 480p", _joint_attention(1, 32760, 40, 128)),
]

_WIDTHS = [  # name, batch, tokens, width
    ("DiT-S/2 256", 64, 256, 384), ("DiT-B/2 256", 64, 256, 768), ("DiT-L/2 256", 64, 256, 1024),
    ("DiT-XL/2 256", 64, 256, 1152), ("DiT-XL/2 512", 32, 1024, 1152), ("PixArt 1024", 4, 4096, 1152),
    ("SD3.5-M 1024", 4, 4096, 1536), ("SD3.5-L 1024", 4, 4096, 2432), ("Flux 1024", 2, 4608, 3072),
    ("Wan 480p", 1, 32760, 5120),
]


def _norm(B, S, D):
    def build(make):
        shift, scale, *_ = make(B, 6 * D).chunk(6, dim=1)
        return (make(B, S, D), scale, shift), {}
    return build


def _norm_per_token(B, S, D):
    def build(make):
        shift, scale, *_ = make(B, S, 6 * D).chunk(6, dim=2)
        return (make(B, S, D), scale, shift), {}
    return build


def _norm_affine(B, S, D, norm):
    def build(make):
        weight, bias = make(D), make(D) if norm == "layer" else None
        return (make(B, S, D),), dict(norm=norm, weight=weight, bias=bias)
    return build


def _gate(B, S, D):
    def build(make):
        return (make(B, S, D), make(B, S, D), make(B, 6 * D).chunk(6, dim=1)[2]), {}
    return build


def _fused(B, S, D, stream=None):
    def build(make):
        _, _, gate, shift, scale, _ = make(B, 6 * D).chunk(6, dim=1)
        return (make(B, S, D, dtype=stream), make(B, S, D), gate, scale, shift), {}
    return build


def _tables(op, B, S, D, per_token=False):
    """Rows of a float32 table beside views of an embedding: `op` is the one that takes it."""
    def build(make):
        table = make(6, D, dtype=torch.float32).unbind(0)
        temb = (make(B, S, 6, D) if per_token else make(B, 6, D)).unbind(-2)
        gated = dict(gate_table=table[2]) if op != "norm_modulate" else {}
        normed = dict(scale_table=table[4], shift_table=table[3]) if op != "gate_residual" else {}
        rows = (temb[2],) * len(gated) + ((temb[4], temb[3]) if normed else ())
        return (*(make(B, S, D) for _ in range(1 + len(gated))), *rows), gated | normed
    return build


def _dual(B, S, D):
    def build(make):
        temb = make(B, 9 * D).chunk(9, dim=1)
        return (make(B, S, D), temb[1], temb[0], temb[7], temb[6]), {}
    return build


ADALN = [Call(op, name, build(B, S, D), quick=name == "DiT-XL/2 256")
         for op, build in (("norm_modulate", _norm), ("gate_residual", _gate), ("gate_residual_norm_modulate", _fused))
         for name, B, S, D in _WIDTHS] + [
    Call("norm_modulate", "DiT-XL/2 256", _norm(64, 256, 1152), "fp32"),
    Call("norm_modulate", "Wan 5B, per token", _norm_per_token(1, 27280, 3072), quick=True),
    Call("norm_modulate", "Wan cross, affine", _norm_affine(1, 32760, 5120, "layer"), quick=True),
    Call("norm_modulate", "LLaDA, RMS affine", _norm_affine(1, 4096, 4096, "rms")),
    *[Call(op, f"{name}, table", _tables(op, *shape), quick=name != "Wan 480p")
      for op in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
      for name, *shape in (("PixArt 1024", 4, 4096, 1152), ("Wan 480p", 1, 32760, 5120),
                           ("Wan 5B, per token", 1, 27280, 3072, True))],
    Call("norm_modulate_dual", "SD3.5-M 1024", _dual(4, 4096, 1536), quick=True),
    Call("norm_modulate_dual", "SD3.5-M 512", _dual(8, 1024, 1536)),
    Call("gate_residual_norm_modulate", "Wan, fp32 stream", _fused(1, 32760, 5120, torch.float32)),
]


def _latents(*shape, patch=2):
    return lambda make: ((make(*shape), patch), {})


def _tokens(B, S, K, grid, patch=2):
    return lambda make: ((make(B, S, K), patch, grid), {})


PATCHIFY = [
    Call("patchify", "DiT-XL/2 256", _latents(64, 4, 32, 32), quick=True),
    Call("unpatchify", "DiT-XL/2 256", _tokens(64, 256, 32, (16, 16)), quick=True),
    Call("patchify", "Flux 1024", _latents(2, 16, 128, 128)),
    Call("patchify", "Wan 480p", _latents(1, 16, 21, 60, 104, patch=(1, 2, 2)), quick=True),
    Call("unpatchify", "Wan 480p", _tokens(1, 32760, 64, (21, 30, 52), (1, 2, 2)), quick=True),
]


def _guided(B, *shape, outputs=1):
    def build(make):  # the model's output for both halves of the batch, of which the learned variance is left out
        cond, uncond = make(2 * B, 2 * shape[0], *shape[1:])[:, :shape[0]].chunk(2)
        return ([make(B, *shape), cond, uncond], make(outputs, 3, dtype=torch.float32, grad=False)), {}
    return build


def _euler(*shape):
    def build(make):
        return ([make(*shape, dtype=torch.float32), make(*shape)], make(1, 2, dtype=torch.float32, grad=False)), {}
    return build


def _ancestral(B, *shape):
    def build(make):  # noise drawn in the kernel
        return ([make(B, *shape), make(B, *shape)], make(1, 3, dtype=torch.float32, grad=False)), dict(
            noise=make(B, 2, dtype=torch.int64, grad=False))
    return build


SAMPLER_STEP = [
    Call("sampler_step", "DiT-XL/2 256, DDIM guided", _guided(32, 4, 32, 32), quick=True),
    Call("sampler_step", "Flux 1024, Euler", _euler(2, 4096, 64), quick=True),
    Call("sampler_step", "DiT-XL/2 256, DDPM", _ancestral(32, 4, 32, 32), quick=True),
]

GRAM = [
    Call("gram", "DiT-XL/2 256, rescaled", lambda make: ((make(64, 8, 32, 32)[:, :4].chunk(2),), {}), quick=True),
    Call("gram", "Flux 1024, rescaled", lambda make: ((make(4, 4096, 64).chunk(2),), {}), quick=True),
]


def _qk_norm_rope(B, S, H, Dh, weights=True, angles=True, **settings):
    def build(make):
        q, k, _ = make(B, S, 3, H, Dh).unbind(2)
        width = H * Dh if settings.get("norm_scope") == "full" else Dh
        kwargs = dict(q_weight=make(width), k_weight=make(width)) if weights else {}
        return (q, k), kwargs | (_angles(make, S, Dh) if angles else {}) | settings
    return build


def _angles(make, S, Dh):
    """Tables as the models make them, every angle twice."""
    return {name: make(S, Dh, dtype=torch.float32, grad=False)[:, ::2] for name in ("cos", "sin")}


def _streams(B, lengths, H, Dh, angles):
    def build(make):
        streams = []
        for S in lengths:
            parameters = dict(q_weight=make(Dh), k_weight=make(Dh)) | (_angles(make, S, Dh) if angles else {})
            streams.append(Stream(*make(B, S, 3, H, Dh).unbind(2), **parameters))
        return (streams,), {}
    return build


QK_NORM_ROPE = [
    Call("qk_norm_rope_joint", "SD3.5-M 1024", _streams(4, (4096, 333), 24, 64, False)),
    Call("qk_norm_rope_joint", "SD3.5-L 1024", _streams(4, (4096, 333), 38, 64, False), quick=True),
    Call("qk_norm_rope_joint", "Flux 1024", _streams(2, (512, 4096), 24, 128, True), quick=True),
    Call("qk_norm_rope", "Flux 1024, single", _qk_norm_rope(2, 4608, 24, 128)),
    Call("qk_norm_rope", "Wan 480p", _qk_norm_rope(1, 32760, 40, 128, norm_scope="full"), quick=True),
    Call("qk_norm_rope", "LLaDA", _qk_norm_rope(1, 4096, 32, 128, weights=False, norm=None, rope="half"), quick=True),
]


def _gated(B, S, F, activation, act_on):
    return lambda make: ((make(B, S, 2 * F),), dict(activation=activation, act_on=act_on))


GATED_ACTIVATION = [
    Call("gated_activation", "Flux.2 klein 1024", _gated(2, 4608, 9216, "silu", "first"), quick=True),
    Call("gated_activation", "SDXL 1024", _gated(4, 1024, 5120, "gelu", "second"), quick=True),
]


def _group_norm(B, C, *spatial, last=False, add=True, activation="silu", eps=1e-5):
    def build(make):
        x = make(B, *spatial, C).movedim(-1, 1) if last else make(B, C, *spatial)
        more = dict(add=make(B, C)) if add else {}
        return (x, 32, make(C), make(C)), dict(activation=activation, eps=eps, **more)
    return build


GROUP_NORM_ACT = [
    Call("group_norm_act", "SDXL 1024", _group_norm(4, 320, 128, 128), quick=True),
    Call("group_norm_act", "SDXL 1024, channels_last", _group_norm(4, 320, 128, 128, last=True), quick=True),
    Call("group_norm_act", "SDXL 1024, inner", _group_norm(4, 1280, 32, 32)),
    Call("group_norm_act", "VAE decoder 1024", _group_norm(1, 128, 1024, 1024, add=False, eps=1e-6), training=False),
    Call("group_norm_act", "SDXL 1024, before attention", _group_norm(4, 640, 64, 64, add=False, activation="none")),
]

CALLS = [*ATTENTION, *ADALN, *QK_NORM_ROPE, *GATED_ACTIVATION, *GROUP_NORM_ACT, *PATCHIFY, *SAMPLER_STEP, *GRAM]
