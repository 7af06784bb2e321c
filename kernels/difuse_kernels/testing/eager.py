"""What a user would write today for each op: the rival of the benchmarks and the yardstick of the error budget."""
import torch
import torch.nn.functional as F

from difuse_kernels.patchify.patchify_reference import patchify, unpatchify  # eager is the reshape itself
from difuse_kernels.sampler_step.sampler_step_reference import normals


def _row(modulation, table=None):
    if table is not None:
        modulation = table + modulation.float()  # as Wan does it, which materialises the modulation in float32
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def norm_modulate(x, scale=None, shift=None, *, scale_table=None, shift_table=None, norm="layer", weight=None,
                  bias=None, eps=1e-6):
    """F.layer_norm or F.rms_norm, then modulate(), as in facebookresearch/DiT."""
    D = x.shape[-1:]
    weight = None if weight is None else weight.to(x.dtype)
    if norm == "layer":
        h = F.layer_norm(x, D, weight, None if bias is None else bias.to(x.dtype), eps)
    else:
        h = F.rms_norm(x, D, weight, eps)
        h = h if bias is None else h + bias
    if scale is not None:
        h = h * (1 + _row(scale, scale_table))
    if shift is not None:
        h = h + _row(shift, shift_table)
    return h.to(x.dtype)


def gate_residual(x, y, gate=None, *, gate_table=None):
    """x + gate * y in the dtype that promotion gives."""
    return (x + (y if gate is None else _row(gate, gate_table) * y)).to(x.dtype)


def gate_residual_norm_modulate(x, y, gate=None, scale=None, shift=None, *, gate_table=None, **settings):
    """The two above, one after the other."""
    x = gate_residual(x, y, gate, gate_table=gate_table)
    return x, norm_modulate(x, scale, shift, **settings)


def norm_modulate_dual(x, scale, shift, scale2, shift2, *, norm="layer", eps=1e-6):
    """One norm and two modulate(), as in diffusers' SD35AdaLayerNormZeroX."""
    h = norm_modulate(x, norm=norm, eps=eps)
    return tuple((h * (1 + _row(a)) + _row(b)).to(x.dtype) for a, b in ((scale, shift), (scale2, shift2)))


def attention(q, k, v, *, scale=None, kv_lengths=None, key_bias=None):
    """F.scaled_dot_product_attention with its transposes; masks become a dense bias."""
    mask = None
    if kv_lengths is not None or key_bias is not None:
        mask = torch.zeros(k.shape[0], 1, 1, k.shape[1], dtype=q.dtype, device=q.device)
        if key_bias is not None:
            mask = mask + key_bias[:, None, None, :]
        if kv_lengths is not None:
            hidden = torch.arange(k.shape[1], device=q.device) >= kv_lengths[:, None]
            mask = mask.masked_fill(hidden[:, None, None, :], float("-inf"))
        mask = mask.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous()


def attention_packed(qkv, *, scale=None, kv_lengths=None, key_bias=None):
    """The same on the three views of one projection."""
    return attention(*qkv.unbind(2), scale=scale, kv_lengths=kv_lengths, key_bias=key_bias)


def sampler_step(inputs, coefficients, *, noise=None, out_dtypes=None):
    """A sum of scaled tensors, one elementwise op after another, in the inputs' dtypes."""
    if noise is not None:  # the same stream as the op's, so that results can be compared
        inputs = (*inputs, normals(noise, inputs[0].shape, torch.float32).to(inputs[0].dtype))
    rows = coefficients.unsqueeze(0) if coefficients.dim() == 2 else coefficients
    tail = (1,) * (inputs[0].dim() - 1)
    outputs = []
    for i in range(rows.shape[1]):
        total = 0
        for j, tensor in enumerate(inputs):
            total = total + rows[:, i, j].reshape(-1, *tail) * tensor
        outputs.append(total.to(out_dtypes[i] if out_dtypes else inputs[0].dtype))
    return tuple(outputs)


def _qk_norm(x, weight, bias, norm, norm_scope, eps):
    """F.rms_norm or F.layer_norm per head, or before the split into heads."""
    shape = x.shape
    x = x.flatten(2) if norm_scope == "full" else x
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if norm == "rms":
        x = F.rms_norm(x, x.shape[-1:], weight, eps)
    elif norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x.reshape(shape)


def _apply_rotary_emb(x, cos, sin, rope):
    """diffusers' apply_rotary_emb with use_real_unbind_dim -1 (interleaved) or -2: in float32, then back."""
    P = cos.shape[-1]
    cos, sin = (t if t.dim() == 4 else t.unsqueeze(-2) for t in (cos, sin))
    turned, rest = x[..., : 2 * P].float(), x[..., 2 * P :]
    if rope == "interleaved":
        a, b = turned.reshape(*x.shape[:-1], P, 2).unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3)
    else:
        a, b = turned.reshape(*x.shape[:-1], 2, P).unbind(-2)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned.to(x.dtype), rest], -1) if rest.shape[-1] else turned.to(x.dtype)


def qk_norm_rope(q, k, *, q_weight=None, k_weight=None, q_bias=None, k_bias=None, cos=None, sin=None, norm="rms",
                 norm_scope="head", eps=1e-6, rope="interleaved"):
    """Norm, then rotation, as diffusers' attention processors do it."""
    q, k = _qk_norm(q, q_weight, q_bias, norm, norm_scope, eps), _qk_norm(k, k_weight, k_bias, norm, norm_scope, eps)
    if cos is not None:
        q, k = _apply_rotary_emb(q, cos, sin, rope), _apply_rotary_emb(k, cos, sin, rope)
    return q, k


def qk_norm_rope_joint(streams, *, norm="rms", norm_scope="head", eps=1e-6, rope="interleaved"):
    """Stream by stream, then torch.cat."""
    parts = []
    for stream in streams:
        q, k, v, *_ = stream
        parameters = {name: getattr(stream, name) for name in stream._fields[3:]}
        parts.append((*qk_norm_rope(q, k, **parameters, norm=norm, norm_scope=norm_scope, eps=eps, rope=rope), v))
    return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


def gated_activation(h, *, activation="gelu", act_on="second"):
    """chunk, F.silu or F.gelu, product, as in diffusers' GEGLU, SwiGLU and Flux2SwiGLU."""
    a, b = h.chunk(2, dim=-1)
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    return act(a) * b if act_on == "first" else a * act(b)


def gelu_tanh(x):
    """F.gelu."""
    return F.gelu(x, approximate="tanh")


def gram(inputs):
    """A sum for every input, a product and a sum for every pair, in float32."""
    xs, over = [x.float() for x in inputs], tuple(range(1, inputs[0].dim()))

    def total(x):
        return x.sum(over) if over else x

    sums = [total(x) for x in xs]
    pairs = {(i, j): total(xs[i] * xs[j]) for i in range(len(xs)) for j in range(i, len(xs))}
    first = torch.full_like(sums[0], inputs[0].shape[1:].numel())
    rows = [[first, *sums]] + [[sums[i], *(pairs[min(i, j), max(i, j)] for j in range(len(xs)))]
                               for i in range(len(xs))]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def group_norm_act(x, groups, weight=None, bias=None, *, add=None, activation="none", eps=1e-5):
    """The embedding added, F.group_norm, F.silu, as in diffusers' ResnetBlock2D."""
    if add is not None:
        x = (x + add.reshape(*add.shape, *(1 for _ in x.shape[2:]))).to(x.dtype)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if weight is None and bias is not None:  # F.group_norm's backward pass fails on it
        weight = torch.ones_like(bias)
    h = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(h) if activation == "silu" else h


EAGER = {f.__name__: f for f in (norm_modulate, gate_residual, gate_residual_norm_modulate, attention,
                                 norm_modulate_dual, attention_packed, patchify, unpatchify, sampler_step,
                                 gated_activation, gelu_tanh, gram, group_norm_act, qk_norm_rope, qk_norm_rope_joint)}
