"""What the adapters share."""
import torch
from torch import nn

from difuse.integrations.registry import adapter_of


def watched(*modules):
    """Whether somebody's hook waits on one of these modules, or replaced its forward; a fused forward calls none."""
    return any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
               or module._backward_pre_hooks
               or ("forward" in vars(module) and adapter_of(vars(module)["forward"]) is None) for module in modules)


def must_not_wait(tensor):
    """Whether the host may not wait for this tensor's values: while a CUDA graph is recorded, or soon will be."""
    return tensor.is_cuda and (torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() > 0)


def is_layer_norm(norm):
    """Whether this is torch's LayerNorm or one of diffusers' by name, and no other subclass."""
    return (isinstance(norm, nn.LayerNorm) and type(norm).__name__ in ("LayerNorm", "FP32LayerNorm")
            and type(norm).__module__.startswith(("torch.", "diffusers.")))


def rows(modulation, x):
    """A modulation [B,...], or [1,...] for the whole batch, with a row for every sample of x [B,...]."""
    return modulation if modulation.shape[0] == x.shape[0] else modulation.expand(x.shape[0], *modulation.shape[1:])


def plain_norm(module, *names):
    """Why one of these children is not a LayerNorm without weights, or None."""
    for name in names:
        norm = getattr(module, name)
        if not is_layer_norm(norm) or norm.weight is not None or norm.bias is not None:
            return f"{name} is {norm}; only a LayerNorm without weights is fused"
    return None


def joined(first, second):
    """cat((first, second), dim=1) of two runs of tokens; free where they are neighbouring views of one tensor."""
    recorded = torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)  # hooks may wait on the views
    base = None if recorded or torch.compiler.is_compiling() else first._base
    if (base is not None and base is second._base and base.dim() == 3 and base.is_contiguous()
            and base.shape == (first.shape[0], first.shape[1] + second.shape[1], first.shape[2])
            and first.stride() == second.stride() == base.stride() and first.storage_offset() == base.storage_offset()
            and second.storage_offset() == base.storage_offset() + first.shape[1] * first.shape[2]):
        return base
    return torch.cat((first, second), dim=1)
