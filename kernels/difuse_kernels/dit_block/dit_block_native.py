"""dit_block on the C++ kernels. Kernel: csrc/dit_block/dit_block_cpu.cpp."""
import torch

from difuse_kernels import native


def dit_block(x, modulation, qkv, proj, fc1, fc2, heads, activation, eps, dtype, workspace, overwrite):
    """See the contract."""
    (B, S, D), F, codes = x.shape, fc1[0].shape[0], fc2[0].precision == "int8"
    M, given, weights = B * S, x.contiguous(), [_weight(pair) for pair in qkv]
    out = x if overwrite and given is x else native.empty((B, S, D), torch.float32, x)
    scratch = [workspace.take(name, shape, dtype) for name, shape in (
        ("projected", (M, 3 * D)), ("attended", (M, D)))]
    hidden = workspace.take("hidden", (M, F), torch.uint8 if codes else dtype)
    hidden_scale = workspace.take("hidden_scale", (M,), torch.float32) if codes else None
    q, k, v = weights if len(weights) == 3 else (*weights, [], [])
    native.ext.dit_block(given.view(M, D), modulation.contiguous(), heads, *eps, q, k, v, _weight(proj), _weight(fc1),
                         activation, _weight(fc2), *scratch, hidden, hidden_scale, out.view(M, D))
    return x.copy_(out) if overwrite and out is not x else out


def _weight(product):
    weight, bias = product
    return [weight.data, weight.scale, weight.sums, weight.smooth, bias]
