"""Cases of norm_modulate, gate_residual, gate_residual_norm_modulate and norm_modulate_dual."""
import torch

from difuse_kernels.testing.case import Case


def _modulation(make, count, B, D):
    """`count` true chunks of one projection, as the models give them: strided [B,D] views."""
    return make("modulation", B, count * D, scale=0.5).chunk(count, dim=1)


def _norm(B, S, D, **kwargs):
    def build(make):
        shift, scale = _modulation(make, 2, B, D)
        return (make("x", B, S, D), scale, shift), kwargs
    return build


def _norm_affine(norm, mean=0.0):
    def build(make):
        B, S, D = 3, 37, 72
        shift, scale = _modulation(make, 2, B, D)
        return (make("x", B, S, D, mean=mean), scale, shift), dict(
            norm=norm, weight=make("weight", D, batched=False), bias=make("bias", D, batched=False), eps=1e-5)
    return build


def _norm_many_samples(make):
    B, S, D = 19, 2, 24
    return (make("x", B, S, D), make("scale", B, D), make("shift", B, D)), dict(
        weight=make("weight", D, batched=False), bias=make("bias", D, batched=False))


def _norm_per_token(make):
    B, S, D = 2, 9, 20
    scale, shift = make("modulation", B, S, 2 * D, scale=0.5).chunk(2, dim=2)
    return (make("x", B, S, D), scale, shift), dict(
        weight=make("weight", D, batched=False), bias=make("bias", D, batched=False))


def _norm_mixed_rows(make):
    B, S, D = 2, 35, 24
    return (make("x", B, S, D), make("scale", B, S, D), make("shift", B, D)), dict(
        norm="rms", weight=make("weight", D, batched=False), bias=make("bias", D, batched=False))


def _norm_strided(make):
    B, S, D = 3, 11, 40
    x = make("x", B, 2 * S, 2 * D)[:, ::2, D:]  # a slice of a joint buffer: every stride but the last is foreign
    scale = make("scale", B, D).unsqueeze(1).expand(-1, S, -1)  # stride 0 over the tokens
    return (x, scale, make("shift", B, D).unsqueeze(1).expand(-1, S, -1)), {}


def _norm_expanded_x(make):
    B, S, D = 2, 5, 16
    return (make("x", B, 1, D).expand(-1, S, -1), make("scale", B, D), make("shift", B, D)), {}


def _norm_mixed_dtypes(make):
    B, S, D = 2, 33, 48
    make_parameter = dict(dtype=torch.float32)
    return (make("x", B, S, D), make("scale", B, D, dtype=torch.bfloat16), make("shift", B, D, **make_parameter)), dict(
        weight=make("weight", D, batched=False, **make_parameter), bias=make("bias", D, batched=False))


def _gate(B, S, D):
    def build(make):
        return (make("x", B, S, D), make("y", B, S, D), make("modulation", B, 3 * D).chunk(3, dim=1)[1]), {}
    return build


def _gate_per_token(make):
    B, S, D = 2, 6, 27
    return (make("x", B, S, D), make("y", B, S, D), make("gate", B, S, 2 * D)[..., D:]), {}


def _gate_strided(make):
    B, S, D = 3, 7, 21
    joint = make("joint", B, S + 4, 2 * D)  # text and image tokens in one buffer
    return (joint[:, 4:, :D], joint[:, 4:, D:], make("gate", B, D)), {}


def _gate_mixed(make):
    B, S, D = 2, 34, 32  # float32 residual stream, bfloat16 branch: what autocast gives
    return (make("x", B, S, D, dtype=torch.float32), make("y", B, S, D), make("gate", B, D, dtype=torch.float32)), {}


def _fused(B, S, D, **kwargs):
    def build(make):
        gate, shift, scale = _modulation(make, 3, B, D)
        return (make("x", B, S, D), make("y", B, S, D), gate, scale, shift), kwargs
    return build


def _fused_affine(norm):
    def build(make):
        B, S, D = 3, 34, 56
        gate, shift, scale = _modulation(make, 3, B, D)
        return (make("x", B, S, D), make("y", B, S, D), gate, scale, shift), dict(
            norm=norm, weight=make("weight", D, batched=False), bias=make("bias", D, batched=False))
    return build


def _fused_bare(make):
    B, S, D = 2, 19, 36
    return (make("x", B, S, D), make("y", B, S, D)), {}


def _fused_per_token(make):
    B, S, D = 2, 10, 24
    gate, scale, shift = make("modulation", B, S, 3 * D, scale=0.5).chunk(3, dim=2)
    return (make("x", B, S, D), make("y", B, S, D), gate, scale, shift), {}


def _fused_mixed(make):
    B, S, D = 2, 33, 40
    return (make("x", B, S, D, dtype=torch.float32), make("y", B, S, D), make("gate", B, D),
            make("scale", B, D), make("shift", B, D)), {}


def _fused_unaligned(make):
    B, S, D = 2, 5, 48  # whole vectors at addresses that are no multiples of 16 bytes
    scale = make("scale", B, 2 * D)[:, 1:D + 1]
    return (make("x", B, S, D + 3)[..., 3:], make("y", B, S, D), make("gate", B, D), scale, make("shift", B, D)), {}


def _fused_strided(make):
    B, S, D = 2, 12, 28
    joint = make("joint", B, S, 2 * D)
    return (joint[..., :D], make("y", B, S + 3, D)[:, 3:], make("gate", B, D), make("scale", B, D), None), {}


def _with_tables(make, B, S, D, per_token=False, dtype=torch.float32):
    """([modulation], [row of a learned table]): strided views of one time embedding, per block or per token."""
    table = make("table", 6, D, dtype=dtype, scale=0.5, batched=False)
    temb = make("temb", B, S, 6, D, scale=0.5) if per_token else make("temb", B, 6, D, scale=0.5)
    return temb.unbind(-2), table.unbind(0)


def _affine(make, D):
    return dict(weight=make("weight", D, batched=False), bias=make("bias", D, batched=False))


def _norm_tables(B, S, D, per_token=False, affine=False, dtype=torch.float32, **kwargs):
    def build(make):
        temb, table = _with_tables(make, B, S, D, per_token, dtype)
        parameters = _affine(make, D) if affine else {}
        return (make("x", B, S, D), temb[1], temb[0]), dict(scale_table=table[1], shift_table=table[0], **parameters,
                                                            **kwargs)
    return build


def _norm_tables_mixed_rows(make):
    B, S, D = 2, 35, 24
    temb, table = _with_tables(make, B, S, D, per_token=True)
    return (make("x", B, S, D), temb[1], make("shift", B, D)), dict(
        scale_table=table[1], shift_table=table[0], **_affine(make, D))


def _norm_shift_tables(make):
    B, S, D = 3, 10, 40
    temb, table = _with_tables(make, B, S, D)
    return (make("x", B, S, D), make("scale", B, D), temb[0]), dict(shift_table=table[0], norm="rms")


def _norm_scale_tables(make):
    B, S, D = 2, 33, 36
    temb, table = _with_tables(make, B, S, D, per_token=True)
    return (make("x", B, S, D), temb[1]), dict(scale_table=table[1])


def _gate_tables(B, S, D, per_token=False, dtype=torch.float32):
    def build(make):
        temb, table = _with_tables(make, B, S, D, per_token, dtype)
        return (make("x", B, S, D), make("y", B, S, D), temb[2]), dict(gate_table=table[2])
    return build


def _fused_tables(B, S, D, per_token=False, affine=False, stream=None, **kwargs):
    def build(make):
        temb, table = _with_tables(make, B, S, D, per_token)
        parameters = _affine(make, D) if affine else {}
        return (make("x", B, S, D, dtype=stream), make("y", B, S, D), temb[2], temb[4], temb[3]), dict(
            gate_table=table[2], scale_table=table[4], shift_table=table[3], **parameters, **kwargs)
    return build


def _fused_tables_mixed_rows(make):
    B, S, D = 2, 35, 24
    temb, table = _with_tables(make, B, S, D)
    scale, shift = make("modulation", B, S, 2 * D, scale=0.5).chunk(2, dim=2)
    return (make("x", B, S, D), make("y", B, S, D), temb[2], scale, shift), dict(gate_table=table[2],
                                                                                  shift_table=table[3])


def _dual(B, S, D, per_token=False, **kwargs):
    def build(make):
        temb = (make("temb", B, S, 9, D, scale=0.5) if per_token else make("temb", B, 9, D, scale=0.5)).unbind(-2)
        return (make("x", B, S, D), temb[1], temb[0], temb[7], temb[6]), kwargs
    return build


def _dual_mixed_rows(make):
    B, S, D = 2, 35, 24
    return (make("x", B, S, D), make("scale", B, S, D), make("shift", B, D), make("scale2", B, D),
            make("shift2", B, S, D)), {}


def _dual_strided(make):
    B, S, D = 3, 11, 40
    x = make("x", B, 2 * S, 2 * D)[:, ::2, D:]
    rows = [make(name, B, D, dtype=torch.float32).unsqueeze(1).expand(-1, S, -1) for name in ("scale", "shift")]
    return (x, *rows, make("scale2", B, D), make("shift2", B, D)), {}


def _cases(op, table):
    return [Case(op, name, build, why, **rest) for name, build, why, rest in table]


def _row(name, build, why, **rest):
    return name, build, why, rest


_TABLES = dict(refused_by=("cuda",))
_SPEED = [((8, 256, 384), "DiT-S/2 at 256"), ((2, 256, 1152), "DiT-XL/2 at 256"), ((8, 1024, 1152), "out of cache")]

NORM_MODULATE = _cases("norm_modulate", [
    _row("dit_s", _norm(2, 65, 384), "whole vectors, more than one task of tokens, ragged last one"),
    _row("odd", _norm(3, 7, 63), "masked tail", grad="transposed"),
    _row("one_row", _norm(2, 1, 8), "one token"),
    _row("narrow", _norm(2, 3, 3), "D below one vector"),
    _row("no_tokens", _norm(2, 0, 16), "zero rows"),
    _row("rms", _norm(2, 33, 100, norm="rms"), "no mean", grad="expanded"),
    _row("affine", _norm_affine("layer"), "weight, bias and their sums over the batch"),
    _row("affine_rms", _norm_affine("rms"), "the same without a mean", grad="transposed"),
    _row("large_mean", _norm_affine("layer", mean=300.0), "variance by E[x^2]-m^2 would cancel"),
    _row("per_token", _norm_per_token, "one modulation row per token"),
    _row("mixed_rows", _norm_mixed_rows, "scale per token, shift per sample"),
    _row("strided", _norm_strided, "joint buffer, expanded modulation", grad="transposed"),
    _row("expanded_x", _norm_expanded_x, "stride 0 over the tokens of x", grad="expanded"),
    _row("mixed_dtypes", _norm_mixed_dtypes, "activation, scale and parameters in different dtypes"),
    _row("wide", _norm(2, 3, 2568), "several warps to a row; in float32 no block holds it in the backward pass"),
    _row("odd_wide", _norm(2, 3, 1301), "no whole vectors, several blocks and warps to a row"),
    _row("many_samples", _norm_many_samples, "more samples than are added side by side"),
    _row("unaligned_rows", lambda make: ((make("x", 2, 5, 51)[..., :48],), {}), "only the first row is aligned"),
    _row("plain", lambda make: ((make("x", 2, 5, 24),), {}), "no modulation at all"),
    _row("tables", _norm_tables(3, 37, 72), "learned rows beside strided views of one embedding", **_TABLES),
    _row("tables_narrow", _norm_tables(2, 9, 24, dtype=None), "the table in the dtype of the rest", **_TABLES),
    _row("tables_affine", _norm_tables(19, 2, 24, affine=True), "many samples' table gradients", **_TABLES),
    _row("tables_per_token", _norm_tables(2, 35, 63, per_token=True, norm="rms"), "sums over tokens and samples",
         grad="transposed", **_TABLES),
    _row("tables_per_token_affine", _norm_tables(2, 34, 40, per_token=True, affine=True), "all sums at once",
         **_TABLES),
    _row("tables_mixed_rows", _norm_tables_mixed_rows, "scale per token, shift per sample", **_TABLES),
    _row("tables_of_shift", _norm_shift_tables, "a table for one of two", grad="expanded", **_TABLES),
    _row("tables_of_scale", _norm_scale_tables, "no shift at all", **_TABLES),
    _row("tables_wide", _norm_tables(2, 5, 1301), "several blocks to a row", **_TABLES),
    _row("tables_wide_per_token", _norm_tables(2, 5, 1304, per_token=True), "the same, rows per token", **_TABLES),
    _row("tables_no_tokens", _norm_tables(2, 0, 16), "table gradients are zeros", **_TABLES),
    *[_row(f"speed_{B}x{S}x{D}", _norm(B, S, D), why, speed=True) for (B, S, D), why in _SPEED],
])
GATE_RESIDUAL = _cases("gate_residual", [
    _row("dit_s", _gate(2, 65, 384), "whole vectors, several tasks"),
    _row("odd", _gate(3, 5, 63), "masked tail", grad="transposed"),
    _row("no_tokens", _gate(2, 0, 8), "zero rows"),
    _row("per_token", _gate_per_token, "one gate row per token", grad="expanded"),
    _row("strided", _gate_strided, "slices of a joint buffer", grad="transposed"),
    _row("mixed", _gate_mixed, "float32 residual stream, narrower branch"),
    _row("wide", _gate(2, 3, 1928), "several warps to a row, several blocks in the backward pass"),
    _row("no_gate", lambda make: ((make("x", 2, 9, 24), make("y", 2, 9, 24)), {}), "a plain residual"),
    _row("tables", _gate_tables(3, 37, 72), "a learned row beside a strided view", grad="transposed", **_TABLES),
    _row("tables_per_token", _gate_tables(2, 35, 63, per_token=True), "sums over tokens and samples", **_TABLES),
    _row("tables_narrow", _gate_tables(2, 9, 1928, dtype=None), "the table in the dtype of the rest", **_TABLES),
    *[_row(f"speed_{B}x{S}x{D}", _gate(B, S, D), why, speed=True) for (B, S, D), why in _SPEED],
])
GATE_RESIDUAL_NORM_MODULATE = _cases("gate_residual_norm_modulate", [
    _row("dit_s", _fused(2, 65, 384), "whole vectors, several tasks"),
    _row("odd", _fused(3, 7, 63), "masked tail", grad="transposed"),
    _row("no_tokens", _fused(2, 0, 8), "zero rows"),
    _row("rms", _fused(2, 33, 100, norm="rms"), "no mean", grad="expanded"),
    _row("affine", _fused_affine("layer"), "weight and bias"),
    _row("affine_rms", _fused_affine("rms"), "weight and bias without a mean"),
    _row("bare", _fused_bare, "add and norm only", grad="transposed"),
    _row("per_token", _fused_per_token, "all three per token"),
    _row("mixed", _fused_mixed, "float32 residual stream, narrower branch and modulation"),
    _row("strided", _fused_strided, "joint buffers, no shift"),
    _row("unaligned", _fused_unaligned, "rows that 16-byte accesses must not touch"),
    _row("dit_xl", _fused(2, 5, 1152), "the widest row that one warp holds"),
    _row("tables", _fused_tables(3, 37, 72), "learned rows beside strided views of one embedding", **_TABLES),
    _row("tables_rms", _fused_tables(2, 33, 63, norm="rms", affine=True), "weight, bias and tables",
         grad="transposed", **_TABLES),
    _row("tables_per_token", _fused_tables(2, 35, 40, per_token=True), "all three per token", grad="expanded",
         **_TABLES),
    _row("tables_per_token_affine", _fused_tables(2, 9, 24, per_token=True, affine=True), "all sums at once",
         **_TABLES),
    _row("tables_mixed_rows", _fused_tables_mixed_rows, "gate per sample, the norm per token", **_TABLES),
    _row("tables_mixed", _fused_tables(2, 33, 40, stream=torch.float32), "float32 residual stream", **_TABLES),
    _row("tables_wide", _fused_tables(2, 5, 1301), "several blocks to a row", **_TABLES),
    *[_row(f"speed_{B}x{S}x{D}", _fused(B, S, D), why, speed=True) for (B, S, D), why in _SPEED],
])
NORM_MODULATE_DUAL = _cases("norm_modulate_dual", [
    _row("sd35", _dual(2, 65, 384), "whole vectors, several tasks, views of one embedding"),
    _row("odd", _dual(3, 7, 63), "masked tail", grad="transposed"),
    _row("no_tokens", _dual(2, 0, 16), "zero rows"),
    _row("rms", _dual(2, 33, 100, norm="rms", eps=1e-5), "no mean", grad="expanded"),
    _row("per_token", _dual(2, 34, 20, per_token=True), "all four per token"),
    _row("mixed_rows", _dual_mixed_rows, "one of each pair per token"),
    _row("strided", _dual_strided, "joint buffer, expanded modulation, other dtypes", grad="transposed"),
    _row("wide", _dual(2, 3, 2568), "several warps to a row"),
    _row("wide_per_token", _dual(2, 5, 1301, per_token=True), "several blocks to a row"),
    *[_row(f"speed_{B}x{S}x{D}", _dual(B, S, D), why, speed=True) for (B, S, D), why in _SPEED],
])
CASES = [*NORM_MODULATE, *GATE_RESIDUAL, *GATE_RESIDUAL_NORM_MODULATE, *NORM_MODULATE_DUAL]
