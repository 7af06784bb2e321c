"""What an op is measured against on a GPU beyond eager PyTorch and torch.compile: SDPA kernels, FlashAttention, Liger.

Each is a function of the case's positional arguments, and of its results nothing is assumed: they are compared first.
"""
import importlib

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}  # the math kernel writes every logit to memory and is left out


def further(case, kwargs):
    """{name: function of the case's positional arguments}; those whose package is missing are not in it."""
    found = {}
    if case.op.startswith("attention"):
        if not {"kv_lengths", "key_bias"} & kwargs.keys():
            found = {name: _sdpa(backend, case.op, kwargs) for name, backend in SDPA.items()}
            flash = _import("flash_attn", "flash_attn_func")
            if flash:
                found["flash_attn"] = lambda *args: flash(*_qkv(case.op, args), softmax_scale=kwargs.get("scale"))
    elif case.op == "gated_activation":
        liger = _liger(kwargs.get("activation", "gelu"))
        if liger:
            found["liger"] = lambda h: liger(*_act_first(h, kwargs.get("act_on", "second")))
    return found


def _sdpa(backend, op, kwargs):
    def call(*args):
        q, k, v = (t.transpose(1, 2) for t in _qkv(op, args))  # [B,H,S,Dh]
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, scale=kwargs.get("scale"), enable_gqa=grouped)
        return out.transpose(1, 2)  # [B,S,H,Dh]

    return call


def _qkv(op, args):
    return args[0].unbind(2) if op == "attention_packed" else args


def _liger(activation):
    """Liger's function of (activated half, other half), or None: it has no exact GELU."""
    module, name = {"silu": ("liger_kernel.ops.swiglu", "LigerSiLUMulFunction"),
                    "gelu_tanh": ("liger_kernel.ops.geglu", "LigerGELUMulFunction")}.get(activation, (None, None))
    function = module and _import(module, name)
    return function and function.apply


def _act_first(h, act_on):
    a, b = h.chunk(2, dim=-1)
    return (a, b) if act_on == "first" else (b, a)


def _import(module, name):
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
