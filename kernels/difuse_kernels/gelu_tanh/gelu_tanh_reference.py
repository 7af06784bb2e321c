"""gelu_tanh in plain PyTorch: the specification. Computes in float32 at least, returns x's dtype."""
import torch
import torch.nn.functional as F


def gelu_tanh(x):
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    return F.gelu(x.to(torch.promote_types(x.dtype, torch.float32)), approximate="tanh").to(x.dtype)
