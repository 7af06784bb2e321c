"""Cases of qk_norm_rope and qk_norm_rope_joint."""
import torch

from difuse_kernels.qk_norm_rope.qk_norm_rope import Stream
from difuse_kernels.testing.case import Case


def _tables(make, *shape, twice=False, dtype=torch.float32, identity=0):
    """cos and sin [S,P], [B,S,P] or [B,S,H,P]; `twice`: views of tables that hold every angle twice, as Flux has them.

    The first `identity` tokens are not turned.
    """
    angles = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    angles[:identity] = 0
    if twice:
        angles = angles.repeat_interleave(2, -1)
    tables = [make.constant(t.to(dtype), batched=len(shape) > 2) for t in (angles.cos(), angles.sin())]
    return dict(zip(("cos", "sin"), (t[..., ::2] if twice else t for t in tables), strict=True))


def _weights(make, D, names=("q_weight", "k_weight"), suffix="", **options):
    return {name: make(name + suffix, D if isinstance(D, int) else D[name[0]], mean=1.0, scale=0.5, batched=False,
                       **options) for name in names}


def _packed(make, B, S, H, D, name="qkv"):
    """q, k, v as slices of one projection."""
    return make(name, B, S, 3, H, D).unbind(2)


def _apart(make, B, S, H, D, kv_heads=None, keys=None, **options):
    """q and k of their own; k is drawn first because the suite differentiates the last output by the first leaf."""
    k = make("k", B, S if keys is None else keys, kv_heads or H, D, **options)
    return make("q", B, S, H, D, **options), k


def _sd3(make):
    q, k, _ = _packed(make, 2, 9, 6, 64)
    return (q, k), _weights(make, 64)


def _flux(make):
    q, k, _ = _packed(make, 2, 11, 3, 128)
    return (q, k), _weights(make, 128) | _tables(make, 11, 64, twice=True, identity=4)


def _qwen(make):
    B, S, D = 2, 7, 32
    return _apart(make, B, S, 8, D, 2), dict(
        rope="half", **_weights(make, D), **_tables(make, S, D // 2))


def _partial(rope, P=6):
    def build(make):
        B, S, H, D = 2, 9, 3, 40
        return _apart(make, B, S, H, D), dict(
            rope=rope, **_weights(make, D), **_tables(make, B, S, P))
    return build


def _ltx(scope):
    def build(make):
        B, S, H, D = 2, 5, 4, 16
        return _apart(make, B, S, H, D), dict(
            norm_scope=scope, eps=1e-5, **_weights(make, H * D if scope == "full" else D),
            **_tables(make, B, S, H, D // 2))
    return build


def _wan(make):
    q, k, _ = _packed(make, 2, 10, 5, 24)
    return (q, k), dict(norm_scope="full", **_weights(make, 120), **_tables(make, 10, 12))


def _full_grouped(make):  # k's rows are shorter than q's
    B, S, D = 2, 6, 20
    return _apart(make, B, S, 6, D, 2), dict(
        norm="layer", norm_scope="full", rope="half", **_tables(make, S, 10),
        **_weights(make, {"q": 120, "k": 40}, ("q_weight", "q_bias", "k_weight", "k_bias")))


def _hunyuan(mean=0.0):
    def build(make):
        B, S, H, D = 2, 17, 3, 88
        return _apart(make, B, S, H, D, mean=mean), dict(
            norm="layer", **_weights(make, D, ("q_weight", "k_weight", "q_bias", "k_bias")), **_tables(make, S, 44))
    return build


def _llada(make):
    B, S, H, D = 2, 9, 2, 48
    return _apart(make, B, S, H, D), dict(norm=None, rope="half", **_tables(make, S, 24))


def _bf16_tables(make):
    B, S, H, D = 2, 6, 3, 32
    return _apart(make, B, S, H, D), dict(
        **_weights(make, D), **_tables(make, B, S, D // 2, dtype=torch.bfloat16))


def _mixed(make):
    B, S, H, D = 2, 35, 2, 24
    return _apart(make, B, S, H, D), dict(
        rope="half", **_weights(make, D, dtype=torch.float32), **_tables(make, S, D // 2))


def _odd(make):
    B, S, H, D = 3, 5, 3, 7
    return _apart(make, B, S, H, D, 1), dict(
        norm="layer", **_weights(make, D, ("q_weight", "q_bias")))


def _lengths(make):  # cross-attention: more keys than queries
    return _apart(make, 2, 3, 2, 16, keys=39), _weights(make, 16)


def _strided(make):
    B, S, H, D = 2, 6, 3, 16
    k = make("k", B, H, S, D).transpose(1, 2)
    q = make("q", B, H, 2 * S, 2 * D)[:, :, ::2, D:].transpose(1, 2)
    return (q, k), _weights(make, D) | _tables(make, S, 8, twice=True)


def _unaligned(make):
    B, S, H, D = 2, 5, 3, 24
    k, q = (make(name, B, S, H, D + 1)[..., 1:] for name in "kq")
    return (q, k), _weights(make, D) | _tables(make, B, S, H, D // 2)


def _whole_vectors(make):  # a rest after halves, both whole vectors; weights that begin anywhere
    B, S, H, D = 2, 3, 5, 48
    heads = _apart(make, B, S, H, D, 4)
    weights = _weights(make, D + 3, ("q_weight", "k_weight", "q_bias", "k_bias"))
    return heads, dict(norm="layer", rope="half", **{name: t[3:] for name, t in weights.items()},
                       **_tables(make, S, 8))


def _expanded(make):
    B, S, H, D = 2, 5, 4, 8
    k, q = make("k", B, 1, H, D).expand(-1, S, -1, -1), make("q", B, S, 1, D).expand(-1, -1, H, -1)
    return (q, k), _weights(make, D) | _tables(make, B, S, D // 2)


def _no_tokens(make):
    return _apart(make, 2, 0, 2, 8), _weights(make, 8) | _tables(make, 0, 4)


def _gradcheck(make):
    B, S, H, D = 2, 3, 2, 6
    return _apart(make, B, S, H, D, 1), dict(
        norm="layer", rope="half", **_weights(make, D, ("q_weight", "k_weight", "q_bias", "k_bias")),
        **_tables(make, B, S, 2))


def _joint(text_first, norm="rms", scope="head", rope="interleaved"):
    def build(make):
        B, H, D, text, image = 2, 3, 16, 5, 9
        row = D if scope == "head" else H * D
        streams = [Stream(*_packed(make, B, S, H, D, f"qkv_{name}"), **_weights(make, row, suffix=f"_{name}"), **tables)
                   for name, S, tables in (("text", text, {}), ("image", image, _tables(make, image, D // 2)))]
        return (streams if text_first else streams[::-1],), dict(norm=norm, norm_scope=scope, rope=rope)
    return build


def _joint_plain(make):  # four streams, grouped heads, nothing but the concatenation and a turn
    B, D = 2, 8
    streams = [Stream(v=make(f"v{i}", B, S, 2, D), k=make(f"k{i}", B, S, 2, D), q=make(f"q{i}", B, S, 4, D),
                      **_tables(make, B, S, 3)) for i, S in enumerate((1, 4, 0, 6))]
    return (streams,), dict(norm=None, rope="half")


def _speed(B, S, H, D, scope="head", twice=False, turned=True):
    def build(make):
        q, k, _ = _packed(make, B, S, H, D)
        tables = _tables(make, S, D // 2, twice=twice) if turned else {}
        return (q, k), dict(norm_scope=scope, **_weights(make, D if scope == "head" else H * D), **tables)
    return build


def _speed_joint(B, text, image, H, D):
    def build(make):
        return ([Stream(*_packed(make, B, S, H, D, f"qkv_{name}"), **_weights(make, D, suffix=f"_{name}"),
                        **_tables(make, S, D // 2, twice=True, identity=S if name == "text" else 0))
                 for name, S in (("text", text), ("image", image))],), {}
    return build


def _row(name, build, why, op="qk_norm_rope", **rest):
    return Case(op, name, build, why, **rest)


CASES = [
    _row("sd3", _sd3, "RMSNorm per head, no rotation, slices of a packed projection"),
    _row("flux", _flux, "interleaved, tables with a strided last dimension, rows that are not turned"),
    _row("qwen", _qwen, "halves, grouped heads", grad="transposed"),
    _row("partial", _partial("interleaved"), "the rest of the head stays; tables per sample"),
    _row("partial_half", _partial("half"), "the same in halves: the rest is a tail of its own"),
    _row("partial_odd", _partial("half", 9), "an odd number of pairs"),
    _row("ltx", _ltx("full"), "norm over the whole token, angles of every head's own", grad="transposed"),
    _row("angles_per_head", _ltx("head"), "angles of every head's own, norm over the head"),
    _row("wan", _wan, "norm over the whole token, heads that are no power of two"),
    _row("full_grouped", _full_grouped, "rows of q and k differ in width; LayerNorm over whole tokens"),
    _row("hunyuan", _hunyuan(), "LayerNorm with bias, masked tail", grad="expanded"),
    _row("large_mean", _hunyuan(mean=300.0), "variance by E[x^2]-m^2 would cancel"),
    _row("llada", _llada, "rotation only: nothing but the angles is kept for the backward pass"),
    _row("bf16_tables", _bf16_tables, "tables of bfloat16, one per sample"),
    _row("mixed", _mixed, "float32 weights beside other activations; more than one task of tokens"),
    _row("odd", _odd, "odd head dimension below a vector, weights of q alone", grad="transposed"),
    _row("lengths", _lengths, "more keys than queries"),
    _row("strided", _strided, "heads before tokens in memory, every stride foreign", grad="transposed"),
    _row("unaligned", _unaligned, "no row begins at 16 bytes; angles of every head's own", grad="transposed"),
    _row("whole_vectors", _whole_vectors, "partial halves of whole vectors; weights that are slices"),
    _row("expanded", _expanded, "stride 0 over heads and over tokens", grad="expanded"),
    _row("no_tokens", _no_tokens, "zero rows: weights still get their zeros"),
    _row("plain", lambda make: (_apart(make, 2, 4, 2, 12), {}), "no weights, no angles"),
    _row("gradcheck", _gradcheck, "every input at once, small"),
    *[_row(name, build, why, "qk_norm_rope_joint", **rest) for name, build, why, rest in (
        ("text_first", _joint(True), "as Flux: two streams with weights of their own, one of them not turned", {}),
        ("image_first", _joint(False, "layer", "full", "half"), "as SD3, and HiDream's norm over the whole token",
         {"grad": "transposed"}),
        ("rotation", _joint_plain, "four streams, one empty; grouped heads", {"grad": "expanded"}),
        ("gradcheck", _joint(True, "layer"), "gradients of every stream", {}),
        ("speed_flux", _speed_joint(1, 512, 4096, 24, 128), "Flux at 1024 x 1024, both streams", {"speed": True}),
    )],
    _row("speed_flux", _speed(1, 4608, 24, 128, twice=True), "Flux at 1024 x 1024, single-stream block", speed=True),
    _row("speed_sd35_large", _speed(1, 4429, 38, 64, turned=False), "SD3.5-L at 1024 x 1024", speed=True),
    _row("speed_wan", _speed(1, 4096, 40, 128, "full"), "Wan 14B, norm over the whole token", speed=True),
    _row("speed_small", _speed(2, 256, 6, 64), "in cache", speed=True),
]
