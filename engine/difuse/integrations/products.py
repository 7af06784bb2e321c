"""Matrix products and convolutions of bfloat16 and float16 models on a CPU that has no instructions for them.

Such a CPU's eager product in bfloat16 runs at a fifth of its float32 rate, a convolution at a hundredth (measured on
two Zen 3 cores: 21 of 125 GFLOP/s; 26 s for a 3x3 convolution of [1,320,64,64] that takes 0.06 s in float32). So the
operands are widened to float32, where the products are exact, and the sum is rounded once, as eager's is. Weights are
widened in pieces of at most 16 MiB; nothing widened outlives the call.
"""
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from difuse.integrations.registry import register


def emulates_bfloat16():
    """Whether oneDNN has no bfloat16 matrix product of its own on this CPU."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


_EMULATED = {dtype for dtype, supported in (  # what this CPU multiplies only by emulation
    (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported),
    (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported)) if not supported()}
_PIECE = 4 << 20  # elements; blocks beyond 32 MiB come fresh from the system, at a page fault every 4 KiB
_FEW_ROWS = 16  # below, reading the weight is all the work, and eager reads half as much


def _not_here(module):
    if not _EMULATED or not module.weight.is_cpu:
        return "the device multiplies bfloat16 and float16 itself"
    return None


def _not_this_convolution(module):
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"padding {module.padding!r} with {module.padding_mode}"
    return _not_here(module)


def _as_eager_multiplies(*tensors):
    """The operands in the dtype that eager would multiply in, torch.autocast's if it is on."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _emulated(x, weight, bias):
    return (x.is_cpu and x.dtype in _EMULATED and weight.dtype == x.dtype
            and (bias is None or bias.dtype == x.dtype))


def _traced():
    return (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0)


def _wide(*tensors):
    return tuple(None if t is None else t.float() for t in tensors)


def _pieces(weight):
    """Slices of the weight's rows, each at most _PIECE elements."""
    rows = max(1, _PIECE // max(1, weight.shape[1]))
    return [slice(i, i + rows) for i in range(0, weight.shape[0], rows)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        y = x.new_empty(*x.shape[:-1], weight.shape[0])  # [...,N]
        rows, out = x.reshape(-1, x.shape[-1]).float(), y.view(-1, weight.shape[0])  # [M,K], [M,N]
        with torch.autocast("cpu", enabled=False):
            for piece in _pieces(weight):
                out[:, piece] = F.linear(rows, *_wide(weight[piece], None if bias is None else bias[piece]))
        return y

    @staticmethod
    def setup_context(ctx, inputs, _output):
        x, weight, bias = inputs
        ctx.bias = bias is not None
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1]).float()  # [M,K]
        grad = grad.reshape(-1, grad.shape[-1]).float()  # [M,N]
        dx = torch.zeros_like(rows) if need_x else None
        dweight = torch.empty_like(weight) if need_weight else None
        with torch.autocast("cpu", enabled=False):
            for piece in _pieces(weight):
                if need_x:
                    dx.addmm_(grad[:, piece], weight[piece].float())  # [M,K]
                if need_weight:
                    dweight[piece] = grad[:, piece].T @ rows  # [N,K]
        return (dx.view(x.shape).to(x.dtype) if need_x else None, dweight,
                grad.sum(0).to(x.dtype) if need_bias and ctx.bias else None)


@register("torch.nn.modules.linear.Linear", refuses=_not_here, kind="layer")
def linear(self, input):
    """input [...,K] -> [...,N]; nn.Linear."""
    x, weight, bias = _as_eager_multiplies(input, self.weight, self.bias)
    if not _emulated(x, weight, bias) or x.numel() < _FEW_ROWS * x.shape[-1]:
        return F.linear(input, self.weight, self.bias)
    if _traced():
        with torch.autocast("cpu", enabled=False):
            return F.linear(*_wide(x, weight, bias)).to(x.dtype)
    return _Linear.apply(x, weight, bias)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, stride, padding, dilation, groups):
        with torch.autocast("cpu", enabled=False):
            return torch.convolution(*_wide(x, weight, bias), stride, padding, dilation, False, [0] * len(stride),
                                     groups).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, _output):
        x, weight, bias, *ctx.geometry = inputs
        ctx.bias = None if bias is None else [bias.shape[0]]
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        stride, padding, dilation, groups = ctx.geometry
        needs = [need and (i < 2 or ctx.bias is not None) for i, need in enumerate(ctx.needs_input_grad[:3])]
        with torch.autocast("cpu", enabled=False):
            found = torch.ops.aten.convolution_backward(
                *_wide(grad, *ctx.saved_tensors), ctx.bias, stride, padding, dilation, False, [0] * len(stride),
                groups, needs)
        found = (g.to(grad.dtype) if need else None for g, need in zip(found, needs, strict=True))
        return *found, None, None, None, None


@register("torch.nn.modules.conv.Conv2d", refuses=_not_this_convolution, kind="layer")
@register("torch.nn.modules.conv.Conv3d", refuses=_not_this_convolution, kind="layer")
def convolution(self, input):
    """input [B,C,(F,)H,W]; nn.Conv2d and nn.Conv3d."""
    x, weight, bias = _as_eager_multiplies(input, self.weight, self.bias)
    geometry = self.stride, self.padding, self.dilation, self.groups
    if not _emulated(x, weight, bias) or x.dim() != weight.dim():
        return type(self).forward(self, input)
    if _traced():
        with torch.autocast("cpu", enabled=False):
            return torch.convolution(*_wide(x, weight, bias), *geometry[:3], False, [0] * len(self.stride),
                                     self.groups).to(x.dtype)
    return _Convolution.apply(x, weight, bias, *geometry)
