"""gated_activation in plain PyTorch: the specification. Computes in float32 at least, returns h's dtype."""
import torch
import torch.nn.functional as F


def gated_activation(h, activation, act_on):
    """act(a) * b or a * act(b), h = [a | b]."""
    a, b = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2, -1)  # [...,F]
    linear, gate = (b, a) if act_on == "first" else (a, b)
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else
                                                            "none")
    return (linear * gate).to(h.dtype)
