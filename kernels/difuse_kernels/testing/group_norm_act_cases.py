"""Cases of group_norm_act. Names that begin with channels_last lie in memory so."""
import torch

from difuse_kernels.testing.case import Case


def _last(x):
    """The same values, lying in memory as [B,*spatial,C]."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _image(*shape, groups, last=False, add=True, affine=True, scale=1.0, mean=0.0, activation="silu", dtype=None,
           **kwargs):
    """Everything there: x, the row before the norm, weight, bias. dtype: of the parameters, and of add."""
    def build(make):
        x = make("x", *shape, scale=scale, mean=mean)
        given = (make("weight", shape[1], dtype=dtype, batched=False),
                 make("bias", shape[1], dtype=dtype, batched=False)) if affine else ()
        more = dict(add=make("add", *shape[:2], dtype=dtype)) if add else {}
        return (_last(x) if last else x, groups, *given), dict(activation=activation, **more, **kwargs)
    return build


def _strided_add(make):
    x, weight = make("x", 2, 6, 5, 3), make("weight", 6, batched=False)
    return (x, 3, weight), dict(add=make("add", 2, 24)[:, 1::4], activation="silu")


def _expanded_add(make):
    x, bias = make("x", 3, 4, 7), make("bias", 4, batched=False)
    return (x, 2, None, bias), dict(add=make("add", 3, 1).expand(-1, 4))


def _uneven_channels(make):
    """Channels far apart within a group: the mean of the group is no channel's."""
    x = make("x", 2, 48, 6, 6)
    far = make.constant(torch.linspace(-300, 300, 48), batched=False).to(x.dtype).reshape(48, 1, 1)
    return (_last(x + far), 2, make("weight", 48, batched=False)), dict(activation="silu")


def _row(name, build, why, **rest):
    return Case("group_norm_act", name, build, why, **rest)


_SPEED = [((2, 320, 64, 64), "SD 1.5, outer blocks"), ((2, 640, 32, 32), "SD 1.5, middle blocks"),
          ((1, 128, 256, 256), "VAE decoder")]

CASES = [
    _row("resnet", _image(2, 32, 8, 8, groups=8), "whole vectors; all operands", grad="transposed"),
    _row("odd", _image(3, 6, 5, 7, groups=2), "masked tails; groups of 3 channels, no power of two"),
    _row("channels_last", _image(2, 32, 8, 8, groups=8, last=True), "the other memory format", grad="transposed"),
    _row("channels_last_odd", _image(3, 10, 5, 7, groups=2, last=True), "tails over channels and rows"),
    _row("plain", _image(2, 8, 4, 4, groups=4, add=False, affine=False, activation="none"), "x alone", grad="expanded"),
    _row("affine", _image(2, 12, 3, 5, groups=3, add=False, activation="none", eps=1e-3), "F.group_norm; another eps"),
    _row("channels_last_affine", _image(2, 12, 3, 5, groups=3, last=True, add=False, activation="none"), "the same",
         grad="expanded"),
    _row("added", _image(2, 12, 3, 5, groups=3, affine=False, activation="none"), "add alone"),
    _row("line", _image(2, 18, 33, groups=3), "one spatial dimension"),
    _row("channels_last_line", _image(2, 18, 33, groups=3, last=True), "tokens [B,S,C], transposed"),
    _row("video", _image(2, 6, 3, 4, 5, groups=3), "three spatial dimensions", grad="transposed"),
    _row("channels_last_video", _image(2, 6, 3, 4, 5, groups=3, last=True), "the same", grad="transposed"),
    _row("mixed", _image(2, 8, 5, 5, groups=2, dtype=torch.float32), "float32 parameters and embedding"),
    _row("channels_last_mixed", _image(2, 8, 5, 5, groups=2, last=True, dtype=torch.float32), "the same"),
    _row("one_group", _image(2, 5, 3, 3, groups=1), "all channels together"),
    _row("instance", _image(2, 13, 3, 7, groups=13), "a group to every channel"),
    _row("one_position", _image(2, 12, 1, 1, groups=3), "no spatial extent: both memory formats at once"),
    _row("one_channel", _image(2, 1, 6, 7, groups=1, affine=False, add=False), "C = 1"),
    _row("large_mean", _image(2, 8, 9, 9, groups=2, mean=300.0, activation="none"), "mean far above the deviation"),
    _row("channels_last_large_mean", _image(2, 8, 9, 9, groups=2, mean=300.0, last=True, activation="none"),
         "the same"),
    _row("channels_last_uneven", _uneven_channels, "channels far apart", grad="transposed"),
    _row("runs", _image(1, 4, 41, 101, groups=1), "channels of several runs, the last short"),
    _row("channels_last_blocks", _image(1, 96, 13, 15, groups=4, last=True), "several blocks of rows"),
    _row("wide", _image(2, 140, 3, 3, groups=2), "70 channels in a group"),
    _row("channels_last_wide", _image(2, 140, 3, 3, groups=2, last=True), "the same"),
    _row("tails", _image(2, 8, 4, 5, groups=2, scale=30.0), "the norm takes the scale out again"),
    _row("strided_add", _strided_add, "add with strides of its own; no bias"),
    _row("expanded_add", _expanded_add, "add of stride 0; no weight", grad="expanded"),
    _row("no_samples", _image(0, 8, 4, 4, groups=2), "B = 0: gradients of the parameters are zeros"),
    *[_row(f"speed_{'x'.join(map(str, shape))}{'_channels_last' * last}", _image(*shape, groups=32, last=last), why,
           speed=True) for shape, why in _SPEED for last in (False, True)],
]
