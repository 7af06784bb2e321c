"""gram in plain PyTorch: the specification."""
import torch


def gram(inputs):
    """G[b] = V V^T, the rows of V [n+1,N] being 1 and the inputs of sample b; float64 [B,n+1,n+1]."""
    samples = [x.double().reshape(len(x), x.shape[1:].numel()) for x in inputs]
    V = torch.stack([torch.ones_like(samples[0]), *samples], 1)  # [B,n+1,N]
    return V @ V.mT
