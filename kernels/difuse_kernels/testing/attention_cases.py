"""Cases of attention."""
import torch

from difuse_kernels.testing.case import Case


def _packed(B, S, H, D, **options):
    """Views of one QKV projection [B,S,3,H,D], as every self-attention has them."""
    def build(make):
        return make("qkv", B, S, 3, H, D, **options).unbind(2), {}
    return build


def _cross(B, Sq, Sk, H, Hkv, D, lengths=None, bias=False, bias_dtype=torch.float32, scale=None):
    def build(make):
        kwargs = {} if scale is None else {"scale": scale}
        if lengths is not None:
            kwargs["kv_lengths"] = make.constant(torch.tensor(lengths, dtype=torch.int32))
        if bias:
            kwargs["key_bias"] = make("bias", B, Sk, scale=2.0, dtype=bias_dtype)
        k, v = make("kv", B, Sk, 2, Hkv, D).unbind(2)
        return (make("q", B, Sq, H, D), k, v), kwargs
    return build


def _extreme(make):
    B, S, H, D = 2, 33, 2, 40
    q, k = make("q", B, S, H, D, scale=100.0), make("k", B, S, H, D, scale=100.0)  # logits of +-1e4
    return (q, k, make("v", B, S, H, D)), {}


def _large_mean(make):
    B, S, H, D = 2, 63, 2, 24
    return (make("q", B, S, H, D), make("k", B, S, H, D, mean=20.0), make("v", B, S, H, D, mean=50.0)), {}


def _head_first(make):
    q, k, v = (make(name, 2, 3, S, 64).transpose(1, 2) for name, S in (("q", 65), ("k", 130), ("v", 130)))
    return (q, k, v), {}


def _strided(make):
    joint = make("joint", 3, 20, 2, 4, 40)  # text and image tokens in one buffer: another S, B and H stride for each
    return (joint[:, 7:, 0, ::2, :16], joint[:, 1::2, 1, 1:3, 16:32], joint[:, ::2, 1, 2:, 24:]), {}


def _expanded(make):
    k = make("k", 2, 1, 1, 16).expand(-1, 9, -1, -1)  # stride 0 over the keys; one value head for both key heads
    v = make("v", 2, 9, 1, 16).expand(-1, -1, 2, -1)
    return (make("q", 2, 1, 4, 16).expand(-1, 5, -1, -1), k.expand(-1, -1, 2, -1), v), {}


def _bias(values, dtype=torch.float32):
    """A constant key bias: `values` on every third key, zero elsewhere, one list entry per sample."""
    def build(make):
        B, S, H, D = len(values), 35, 2, 24
        bias = torch.zeros(B, S, dtype=dtype)
        bias[:, ::3] = torch.tensor(values, dtype=dtype)[:, None]
        return make("qkv", B, S, 3, H, D).unbind(2), {"key_bias": make.constant(bias)}
    return build


def _padded_caption(make):
    bias = torch.zeros(3, 160)  # one sample all at the lowest number, one partly, lengths from a table's column
    bias[0], bias[1, 100:] = torch.finfo(torch.float32).min, -1e9
    lengths = torch.tensor([[160, 9], [160, 9], [131, 9]], dtype=torch.int32)[:, 0]
    q, k, v = (make(name, 3, S, 2, 16) for name, S in (("q", 21), ("k", 160), ("v", 160)))
    return (q, k, v), {"key_bias": make.constant(bias), "kv_lengths": make.constant(lengths)}


def _uniform_bias(make):
    bias = torch.full((2, 35), -1e4)  # every key "masked" by a finite number: plain attention again
    return make("qkv", 2, 35, 3, 2, 24).unbind(2), {"key_bias": make.constant(bias)}


def _whole(B, S, H, D, lengths=None, bias=False):
    """One projection handed over as it is."""
    def build(make):
        kwargs = {}
        if lengths is not None:
            kwargs["kv_lengths"] = make.constant(torch.tensor(lengths, dtype=torch.int32))
        if bias:
            kwargs["key_bias"] = make("bias", B, S, scale=2.0)
        return (make("qkv", B, S, 3, H, D),), kwargs
    return build


def _whole_strided(make):
    return (make("qkv", 2, 3, 41, 2, 48).transpose(1, 2)[..., 8:],), {"scale": -0.2}  # [B,3,S,H,Dh], a slice of heads


CASES = [Case("attention", name, build, why, grad=grad) for name, build, why, grad in [
    ("dit_s", _packed(2, 65, 6, 64), "packed projection, more than one block of queries", "dense"),
    ("dit_xl", _packed(2, 129, 2, 72), "head dimension 72, two blocks of keys, the last of one", "transposed"),
    ("sd_40", _packed(2, 63, 2, 40), "head dimension 40", "dense"),
    ("wide", _packed(2, 50, 1, 160), "head dimension 160", "expanded"),
    ("widest", _cross(1, 7, 255, 1, 1, 256), "head dimension 256", "dense"),
    ("narrow", _cross(2, 5, 7, 2, 2, 8), "head dimension below one vector", "dense"),
    ("odd", _cross(2, 7, 3, 4, 2, 8, bias=True, bias_dtype=None),
     "small, with a bias to differentiate", "transposed"),
    ("one_token", _cross(3, 1, 1, 2, 1, 16), "one query, one key", "dense"),
    ("one_query", _cross(2, 1, 255, 4, 2, 64), "decoding: one query, many keys", "dense"),
    ("grouped", _cross(2, 65, 63, 6, 2, 40), "three query heads per key head", "transposed"),
    ("multi_query", _cross(2, 33, 129, 4, 1, 48), "one key head", "expanded"),
    ("lengths", _cross(3, 49, 129, 2, 2, 24, lengths=[129, 1, 64]), "another length per sample", "dense"),
    ("no_visible_key", _cross(3, 5, 40, 2, 1, 32, lengths=[40, 0, 7], bias=True), "one sample sees nothing", "dense"),
    ("lengths_bias", _cross(2, 50, 150, 4, 2, 72, lengths=[150, 131], bias=True), "both masks, grouped heads", "dense"),
    ("bias", _cross(2, 47, 129, 3, 3, 64, bias=True), "a float32 bias with its gradient", "transposed"),
    ("bias_minus_1e4", _bias([-1e4, 0.0, -1e4]), "a finite mask is added, not special", "dense"),
    ("bias_all_1e4", _uniform_bias, "every key at -1e4: a softmax like any other", "dense"),
    ("bias_lowest", _padded_caption, "every key at the lowest finite number, strided lengths", "dense"),
    ("bias_minus_inf", _bias([-torch.inf, 1.0]), "an infinite mask hides", "dense"),
    ("bias_bf16", _bias([-3.0, 2.5], torch.bfloat16), "a narrow bias", "dense"),
    ("scale", _cross(2, 9, 50, 2, 2, 40, scale=0.5), "a scale of one's own", "dense"),
    ("negative_scale", _cross(2, 9, 50, 2, 2, 40, scale=-0.3), "the smallest product wins", "dense"),
    ("extreme", _extreme, "logits of +-1e4", "dense"),
    ("large_mean", _large_mean, "keys and values far from zero", "dense"),
    ("head_first", _head_first, "[B,H,S,Dh] seen as [B,S,H,Dh]", "transposed"),
    ("strided", _strided, "slices of a joint buffer", "transposed"),
    ("expanded", _expanded, "stride 0 in tokens and heads", "expanded"),
    ("no_keys_zeros", _cross(2, 5, 0, 2, 2, 16), "zero keys", "dense"),
    ("no_queries", _cross(2, 0, 5, 2, 2, 16), "zero queries", "dense"),
    ("no_samples", _packed(0, 5, 2, 16), "zero samples", "dense"),
]] + [
    Case("attention_packed", name, build, why, grad=grad) for name, build, why, grad in [
        ("dit_xl", _whole(2, 65, 2, 72), "the gradient of one projection, head dimension 72", "transposed"),
        ("lengths_bias", _whole(2, 70, 2, 24, lengths=[70, 33], bias=True), "both masks", "dense"),
        ("strided", _whole_strided, "foreign strides of the three, of tokens and of heads", "expanded"),
        ("no_tokens", _whole(2, 0, 2, 16), "zero tokens", "dense"),
    ]
] + [
    Case("attention", f"speed_{B}x{S}x{H}x{D}", _packed(B, S, H, D), why, speed=True)
    for B, S, H, D, why in ((8, 256, 16, 72, "DiT-XL/2 at 256"), (2, 1024, 16, 72, "DiT-XL/2 at 512"),
                            (8, 256, 6, 64, "DiT-S/2 at 256"), (2, 1024, 6, 64, "DiT-S/2 at 512"))
]
