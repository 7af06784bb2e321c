"""Cases of gram."""
import torch

from difuse_kernels.testing.case import Case


def _dense(n, *shape, **options):
    return lambda make: (([make(f"x{i}", *shape, **options) for i in range(n)],), {})


def _halves(*shape):
    """The conditional and unconditional means in a model's output with learned variance."""
    def build(make):
        B, C = shape[:2]
        return ([make(name, B, 2 * C, *shape[2:])[:, :C] for name in ("cond", "null")],), {}
    return build


def _strided(make):
    return ([make("x0", 2, 6, 5, 3).permute(0, 3, 1, 2), make("x1", 2, 3, 12, 9)[:, :, ::2, 2:7],
             make("x2", 2, 1, 6, 1).expand(-1, 3, -1, 5)],), {}


def _mixed(make):
    dtypes = torch.float32, torch.bfloat16, torch.float16, None
    return ([make(f"x{j}", 2, 3, 5, 7, dtype=dtype) for j, dtype in enumerate(dtypes)],), {}


CASES = [Case("gram", name, build, why, grad=grad) for name, build, why, grad in [
    ("halves", _halves(3, 4, 8, 8), "samples apart in memory, each dense", "dense"),
    ("odd", _halves(2, 3, 7, 9), "ragged tail", "transposed"),
    ("one", _dense(1, 3, 175, mean=100.0), "a norm; a mean far from zero", "expanded"),
    ("three", _dense(3, 2, 4, 33, 5), "three inputs, more than one block", "dense"),
    ("four", _dense(4, 3, 2, 17), "the most inputs", "transposed"),
    ("chunks", _dense(2, 2, 20011), "more than one task and one program of a sample", "dense"),
    ("mixed", _mixed, "four dtypes", "dense"),
    ("strided", _strided, "samples that are not dense are copied", "transposed"),
    ("rows_1d", _dense(2, 5), "samples of one number", "dense"),
    ("no_samples", _dense(2, 0, 4), "zero samples", "dense"),
    ("gradcheck", _dense(3, 2, 3, 2), "small", "dense"),
]] + [
    Case("gram", f"speed_{'x'.join(map(str, shape))}", _halves(*shape), "guidance by norms", speed=True)
    for shape in ((8, 4, 32, 32), (2, 16, 128, 128))
]
