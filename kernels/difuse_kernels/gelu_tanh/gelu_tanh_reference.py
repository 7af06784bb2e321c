"""gelu_tanh in plain PyTorch: the specification. torch computes 16-bit tensors in float32."""
import torch.nn.functional as F


def gelu_tanh(x):
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    return F.gelu(x, approximate="tanh")
