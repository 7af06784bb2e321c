"""adaln on the Triton kernels: allocate the outputs, choose the configuration, launch."""
import torch
import triton

from difuse_kernels.adaln import adaln_triton_config as configs
from difuse_kernels.adaln.adaln_triton_backward import (
    backward_kernel,
    backward_statistics_kernel,
    batch_sums_kernel,
    sample_sums_kernel,
    table_sums_kernel,
)
from difuse_kernels.adaln.adaln_triton_dual import dual_backward_kernel, dual_backward_statistics_kernel, dual_kernel
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


def _forward(x, y, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, rms, eps, x_new, h, mean,
             rstd):
    B, S, D = x.shape
    config = configs.forward(D, x.element_size(), architecture(x))
    spans, blocks = triton.cdiv(S, config.ROWS), triton.cdiv(D, config.columns)
    given = h is not None and blocks > 1
    if given:
        if mean is None:
            mean, rstd = _floats(B, S, like=x), _floats(B, S, like=x)
        launch(statistics_kernel, (B * spans,), x, y, gate, gate_table, mean, rstd, eps, S, *_strides(x, y, gate),
               config=config, D=D, RMS=rms)
    launch(forward_kernel, (B * spans * blocks,), x, y, gate, scale, shift, weight, bias, gate_table, scale_table,
           shift_table, x_new, h, mean, rstd, eps, S, *_strides(x, y, gate, scale, shift), config=config, D=D, RMS=rms,
           GIVEN=given)


def _stats(x, save):
    return (_floats(*x.shape[:2], like=x), _floats(*x.shape[:2], like=x)) if save else (None, None)


def norm_modulate_forward(x, scale, shift, weight, bias, scale_table, shift_table, norm, eps, save):
    """(h, mean, rstd); the last two are None unless `save`."""
    h = like(x)
    mean, rstd = _stats(x, save)
    _forward(x, None, None, scale, shift, weight, bias, None, scale_table, shift_table, norm == "rms", eps, None, h,
             mean, rstd)
    return h, mean, rstd


def gate_residual_norm_modulate_forward(x, y, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table,
                                        norm, eps, save):
    """(x', h, mean, rstd); the last two are None unless `save`."""
    x_new, h = like(x), like(x)
    mean, rstd = _stats(x, save)
    _forward(x, y, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, norm == "rms", eps, x_new, h,
             mean, rstd)
    return x_new, h, mean, rstd


def gate_residual_forward(x, y, gate, gate_table):
    """x + gate * y."""
    out = like(x)
    _forward(x, y, gate, None, None, None, None, gate_table, None, None, True, 0.0, out, None, None, None)
    return out


def norm_modulate_dual_forward(x, scale, shift, scale2, shift2, norm, eps, save):
    """(h, h2, mean, rstd); the last two are None unless `save`."""
    B, S, D = x.shape
    rms, h, h2 = norm == "rms", like(x), like(x)
    config = configs.forward(D, x.element_size(), architecture(x))
    spans, blocks = triton.cdiv(S, config.ROWS), triton.cdiv(D, config.columns)
    mean, rstd = _stats(x, save or blocks > 1)
    if blocks > 1:
        launch(statistics_kernel, (B * spans,), x, None, None, None, mean, rstd, eps, S, *_strides(x, None, None),
               config=config, D=D, RMS=rms)
    launch(dual_kernel, (B * spans * blocks,), x, scale, shift, scale2, shift2, h, h2, mean, rstd, eps, S,
           *_strides(x, scale, shift, scale2, shift2), config=config, D=D, RMS=rms, GIVEN=blocks > 1)
    return (h, h2, mean, rstd) if save else (h, h2, None, None)


def _backward(dx_new, dh, x, y, gate, scale, shift, weight, bias, tables, mean, rstd, rms, dx, dy, needs):
    """Fills dx and dy where they are given; returns the gradients of gate, scale, shift, weight, bias and of `tables`,
    those of gate, scale, shift; None where not needed.
    """
    some = dx_new if x is None else x
    B, S, D = some.shape
    arch = architecture(some)
    grads = [like(t) if need and t is not None else None
             for t, need in zip((gate, scale, shift, weight, bias, *tables), needs, strict=True)]
    *modulations, dweight, dbias, dgate_table, dscale_table, dshift_table = grads
    token_grads = [g if _per_token(g) else None for g in modulations]
    sample_grads = [None if _per_token(g) else g for g in modulations]
    affine = dweight is not None or dbias is not None
    tokens = _per_token(scale)
    scaled, shifted = dscale_table is not None, dshift_table is not None
    flags = dict(
        SUM_XHAT=sample_grads[1] is not None or dweight is not None or (scaled and not tokens),
        SUM_DN=dbias is not None or (not tokens and (
            sample_grads[2] is not None or shifted or (bias is not None and (scaled or sample_grads[1] is not None)))),
        SUM_GATE=sample_grads[0] is not None or dgate_table is not None,
        SUM_PRODUCT=scaled and tokens,
        SUM_DH=tokens and (sample_grads[2] is not None or shifted or (scaled and bias is not None)))
    streams = sum(t is not None for t in (dx_new, dh, x, y)) + tokens + _per_token(gate)
    config = configs.backward(S, D, some.element_size(), streams, arch)
    runs, blocks = triton.cdiv(S, config.TOKENS), triton.cdiv(D, config.columns)
    partial = _floats(B, runs, sum(flags.values()), D, like=some)
    c1 = c2 = None
    if dh is not None and blocks > 1:
        c1, c2 = _floats(B, S, like=some), _floats(B, S, like=some)
        rows = configs.forward(D, some.element_size(), arch)
        launch(backward_statistics_kernel, (B * triton.cdiv(S, rows.ROWS),), dh, x, scale, tables[1], weight, mean,
               rstd, c1, c2, S, *_strides(dh, x, scale), config=rows, D=D, SCALE_TOKENS=tokens, RMS=rms)
    launch(backward_kernel, (B * runs * blocks,), dx_new, dh, x, y, gate, scale, weight, bias, *tables[:2], mean, rstd,
           c1, c2, dx, dy, *token_grads, partial, S, *_strides(dx_new, dh, x, y, gate, scale), config=config, D=D,
           GATE_TOKENS=_per_token(gate), SCALE_TOKENS=tokens, RMS=rms, **flags)
    if not any(flags.values()):
        return grads
    config = configs.sums(arch)
    blocks = triton.cdiv(D, config.WIDTH)
    total = _floats(B, 2, D, like=some) if affine else None
    rows = [None if grad is None else _floats(B, D, like=some) for grad in grads[5:]]
    launch(sample_sums_kernel, (B * blocks,), partial, weight, bias, *sample_grads, *rows, total, runs, config=config,
           D=D, SCALE_TOKENS=tokens, **flags)
    if affine:
        launch(batch_sums_kernel, (blocks,), total, None if tokens else scale, tables[1], dweight, dbias, B,
               0 if scale is None else scale.stride(0), config=config, D=D)
    if any(row is not None for row in rows):
        launch(table_sums_kernel, (blocks,), *rows, *grads[5:], B, config=config, D=D)
    return grads


def gate_residual_norm_modulate_backward(grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias, gate_table,
                                         scale_table, shift_table, mean, rstd, norm, needs):
    """Gradients of x, y, gate, scale, shift, weight, bias and the tables of gate, scale, shift; None where not needed.
    grad_x or grad_h may be None."""
    need_x, need_y, *others = needs
    if grad_h is None:
        dx, dy, dgate, dgate_table = gate_residual_backward(grad_x, y, gate, gate_table, (*needs[:3], needs[7]))
        *zeros, dscale_table, dshift_table = (
            like(t).zero_() if need and t is not None else None
            for t, need in zip((scale, shift, weight, bias, scale_table, shift_table), (*needs[3:7], *needs[8:]),
                               strict=True))
        return dx, dy, dgate, *zeros, dgate_table, dscale_table, dshift_table
    grad_x, grad_h = (None if g is None else dense_last(g) for g in (grad_x, grad_h))
    dx, dy = like(x_new) if need_x else None, like(y) if need_y and y is not None else None
    grads = _backward(grad_x, grad_h, x_new, y, gate, scale, shift, weight, bias,
                      (gate_table, scale_table, shift_table), mean, rstd, norm == "rms", dx, dy, others)
    return dx, dy, *grads


def norm_modulate_backward(grad, x, scale, shift, weight, bias, scale_table, shift_table, mean, rstd, norm, needs):
    """Gradients of x, scale, shift, weight, bias and the tables of scale, shift; None where not needed."""
    need_x, *others, need_scale_table, need_shift_table = needs
    dx, _, _, *grads, _, dscale_table, dshift_table = gate_residual_norm_modulate_backward(
        None, grad, x, None, None, scale, shift, weight, bias, None, scale_table, shift_table, mean, rstd, norm,
        (need_x, False, False, *others, False, need_scale_table, need_shift_table))
    return dx, *grads, dscale_table, dshift_table


def gate_residual_backward(grad, y, gate, gate_table, needs):
    """Gradients of x, y, gate and its table; None where not needed."""
    need_x, need_y, need_gate, need_table = needs
    grad = dense_last(grad)
    dy = dgate = dtable = None
    if gate is None:
        dy = grad.to(y.dtype) if need_y else None
    elif need_y or need_gate or need_table:
        dy = like(y) if need_y else None
        dgate, *_, dtable, _, _ = _backward(
            grad, None, None, y, gate, None, None, None, None, (gate_table, None, None), None, None, True, None, dy,
            (need_gate, False, False, False, False, need_table, False, False))
    return grad if need_x else None, dy, dgate, dtable


def norm_modulate_dual_backward(grad, grad2, x, scale, shift, scale2, shift2, mean, rstd, norm, needs):
    """Gradients of x, scale, shift, scale2, shift2; None where not needed. grad or grad2 may be None."""
    B, S, D = x.shape
    rms, arch, rows = norm == "rms", architecture(x), (scale, shift, scale2, shift2)
    dx, *grads = (like(t) if need else None for t, need in zip((x, *rows), needs, strict=True))
    if grad is None or grad2 is None:  # one of the results is not used: nothing reaches its modulation
        used = 0 if grad2 is None else 2
        dx, *found = norm_modulate_backward(grad if grad2 is None else grad2, x, *rows[used : used + 2], *(None,) * 4,
                                            mean, rstd, norm, (needs[0], *needs[1 + used : 3 + used], *(False,) * 4))
        zeros = [None if g is None else g.zero_() for g in grads[2 - used : 4 - used]]
        return (dx, *zeros, *found[:2]) if used else (dx, *found[:2], *zeros)
    grad, grad2 = dense_last(grad), dense_last(grad2)
    token_grads = [g if _per_token(g) else None for g in grads]
    sample_grads = [None if _per_token(g) else g for g in grads]
    sums = any(g is not None for g in sample_grads)
    config = configs.backward(S, D, x.element_size(), 3 + sum(map(_per_token, (scale, scale2))), arch, 4)
    runs, blocks = triton.cdiv(S, config.TOKENS), triton.cdiv(D, config.columns)
    partial = [_floats(B, runs, 2, D, like=x) for _ in range(2)] if sums else [None, None]
    c1 = c2 = None
    strides = _strides(grad, grad2, x, scale, scale2)
    flags = dict(RMS=rms, TOKENS1=_per_token(scale), TOKENS2=_per_token(scale2))
    if blocks > 1:
        c1, c2 = _stats(x, True)
        wide = configs.forward(D, x.element_size(), arch)
        launch(dual_backward_statistics_kernel, (B * triton.cdiv(S, wide.ROWS),), grad, grad2, x, scale, scale2, mean,
               rstd, c1, c2, S, *strides, config=wide, D=D, **flags)
    launch(dual_backward_kernel, (B * runs * blocks,), grad, grad2, x, scale, scale2, mean, rstd, c1, c2, dx,
           *token_grads, *partial, S, *strides, config=config, D=D, **flags)
    if sums:
        config = configs.sums(arch)
        for part, pair in zip(partial, (sample_grads[:2], sample_grads[2:]), strict=True):
            launch(sample_sums_kernel, (B * triton.cdiv(D, config.WIDTH),), part, None, None, None, *pair, None, None,
                   None, None, runs, config=config, D=D, SCALE_TOKENS=False, SUM_XHAT=True, SUM_DN=True,
                   SUM_GATE=False, SUM_PRODUCT=False, SUM_DH=False)
    return dx, *grads
