"""adaln on the Triton kernels: allocate the outputs, choose the configuration, launch."""
import torch
import triton

from difuse_kernels.adaln import adaln_triton_config as configs
from difuse_kernels.adaln.adaln_triton_backward import (
    backward_kernel,
    backward_statistics_kernel,
    batch_sums_kernel,
    sample_sums_kernel,
)
from difuse_kernels.adaln.adaln_triton_forward import forward_kernel, statistics_kernel
from difuse_kernels.checks import dense_last
from difuse_kernels.library import like
from difuse_kernels.triton_launch import architecture, launch, why_not_triton


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None."""
    return why_not_triton(inputs)


def _strides(*tensors):
    """(stride of the samples, stride of the tokens) of each; 0 where there are none."""
    found = []
    for t in tensors:
        found += (0, 0) if t is None else (t.stride(0), t.stride(1) if t.dim() == 3 else 0)
    return found


def _per_token(modulation):
    return modulation is not None and modulation.dim() == 3


def _floats(*shape, like):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _forward(x, y, gate, scale, shift, weight, bias, rms, eps, x_new, h, mean, rstd):
    B, S, D = x.shape
    config = configs.forward(D, x.element_size(), architecture(x))
    spans, blocks = triton.cdiv(S, config.ROWS), triton.cdiv(D, config.columns)
    given = h is not None and blocks > 1
    if given:
        if mean is None:
            mean, rstd = _floats(B, S, like=x), _floats(B, S, like=x)
        launch(statistics_kernel, (B * spans,), x, y, gate, mean, rstd, eps, S, *_strides(x, y, gate), config=config,
               D=D, RMS=rms)
    launch(forward_kernel, (B * spans * blocks,), x, y, gate, scale, shift, weight, bias, x_new, h, mean, rstd, eps, S,
           *_strides(x, y, gate, scale, shift), config=config, D=D, RMS=rms, GIVEN=given)


def norm_modulate_forward(x, scale, shift, weight, bias, norm, eps, save):
    """(h, mean, rstd); the last two are None unless `save`."""
    h = like(x)
    mean, rstd = (_floats(*x.shape[:2], like=x), _floats(*x.shape[:2], like=x)) if save else (None, None)
    _forward(x, None, None, scale, shift, weight, bias, norm == "rms", eps, None, h, mean, rstd)
    return h, mean, rstd


def gate_residual_norm_modulate_forward(x, y, gate, scale, shift, weight, bias, norm, eps, save):
    """(x', h, mean, rstd); the last two are None unless `save`."""
    x_new, h = like(x), like(x)
    mean, rstd = (_floats(*x.shape[:2], like=x), _floats(*x.shape[:2], like=x)) if save else (None, None)
    _forward(x, y, gate, scale, shift, weight, bias, norm == "rms", eps, x_new, h, mean, rstd)
    return x_new, h, mean, rstd


def gate_residual_forward(x, y, gate):
    """x + gate * y."""
    out = like(x)
    _forward(x, y, gate, None, None, None, None, True, 0.0, out, None, None, None)
    return out


def _backward(dx_new, dh, x, y, gate, scale, shift, weight, bias, mean, rstd, rms, dx, dy, needs):
    """Fills dx and dy where they are given; returns dgate, dscale, dshift, dweight, dbias, None where not needed."""
    some = dx_new if x is None else x
    B, S, D = some.shape
    arch = architecture(some)
    grads = dgate, dscale, dshift, dweight, dbias = [
        like(t) if need and t is not None else None
        for t, need in zip((gate, scale, shift, weight, bias), needs, strict=True)]
    token_grads = [g if _per_token(g) else None for g in grads[:3]]
    sample_grads = [None if _per_token(g) else g for g in grads[:3]]
    affine = dweight is not None or dbias is not None
    tokens = _per_token(scale)
    flags = dict(
        SUM_XHAT=sample_grads[1] is not None or dweight is not None,
        SUM_DN=dbias is not None or (sample_grads[1] is not None and bias is not None) or (
            sample_grads[2] is not None and not tokens),
        SUM_GATE=sample_grads[0] is not None, SUM_DH=sample_grads[2] is not None and tokens)
    streams = sum(t is not None for t in (dx_new, dh, x, y)) + tokens + _per_token(gate)
    config = configs.backward(S, D, some.element_size(), streams, arch)
    runs, blocks = triton.cdiv(S, config.TOKENS), triton.cdiv(D, config.columns)
    partial = _floats(B, runs, sum(flags.values()), D, like=some)
    c1 = c2 = None
    if dh is not None and blocks > 1:
        c1, c2 = _floats(B, S, like=some), _floats(B, S, like=some)
        rows = configs.forward(D, some.element_size(), arch)
        launch(backward_statistics_kernel, (B * triton.cdiv(S, rows.ROWS),), dh, x, scale, weight, mean, rstd, c1, c2,
               S, *_strides(dh, x, scale), config=rows, D=D, SCALE_TOKENS=tokens, RMS=rms)
    launch(backward_kernel, (B * runs * blocks,), dx_new, dh, x, y, gate, scale, weight, bias, mean, rstd, c1, c2, dx,
           dy, *token_grads, partial, S, *_strides(dx_new, dh, x, y, gate, scale), config=config, D=D,
           GATE_TOKENS=_per_token(gate), SCALE_TOKENS=tokens, RMS=rms, **flags)
    if not any(flags.values()):
        return grads
    config = configs.sums(arch)
    blocks = triton.cdiv(D, config.WIDTH)
    total = _floats(B, 2, D, like=some) if affine else None
    launch(sample_sums_kernel, (B * blocks,), partial, weight, bias, *sample_grads, total, runs, config=config, D=D,
           SCALE_TOKENS=tokens, **flags)
    if affine:
        launch(batch_sums_kernel, (blocks,), total, None if tokens else scale, dweight, dbias, B,
               0 if scale is None else scale.stride(0), config=config, D=D)
    return grads


def gate_residual_norm_modulate_backward(grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias, mean, rstd, norm,
                                         needs):
    """Gradients of x, y, gate, scale, shift, weight, bias; None where not needed. grad_x or grad_h may be None."""
    need_x, need_y, *others = needs
    if grad_h is None:
        zeros = [like(t).zero_() if need and t is not None else None
                 for t, need in zip((scale, shift, weight, bias), others[1:], strict=True)]
        return *gate_residual_backward(grad_x, y, gate, needs[:3]), *zeros
    grad_x, grad_h = (None if g is None else dense_last(g) for g in (grad_x, grad_h))
    dx, dy = like(x_new) if need_x else None, like(y) if need_y and y is not None else None
    grads = _backward(grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias, mean, rstd, norm == "rms", dx, dy,
                      others)
    return dx, dy, *grads


def norm_modulate_backward(grad, x, scale, shift, weight, bias, mean, rstd, norm, needs):
    """Gradients of x, scale, shift, weight, bias; None where not needed."""
    need_x, *others = needs
    dx, _, _, *grads = gate_residual_norm_modulate_backward(
        None, grad, x, None, None, scale, shift, weight, bias, mean, rstd, norm, (need_x, False, False, *others))
    return dx, *grads


def gate_residual_backward(grad, y, gate, needs):
    """Gradients of x, y, gate; None where not needed."""
    need_x, need_y, need_gate = needs
    grad = dense_last(grad)
    dy = dgate = None
    if gate is None:
        dy = grad.to(y.dtype) if need_y else None
    elif need_y or need_gate:
        dy = like(y) if need_y else None
        dgate, *_ = _backward(grad, None, None, y, gate, None, None, None, None, None, None, True, None, dy,
                              (need_gate, False, False, False, False))
    return grad if need_x else None, dy, dgate
