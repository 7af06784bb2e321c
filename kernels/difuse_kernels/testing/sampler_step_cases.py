"""Cases of sampler_step."""
import torch

from difuse_kernels.testing.case import Case


def coefficients(*shape):
    """Random float32 coefficients [I,J] or [B,I,J]."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _dense(J, I, *shape, per_sample=False):  # noqa: E741
    def build(make):
        c = coefficients(shape[0], I, J) if per_sample else coefficients(I, J)
        return ([make(f"x{j}", *shape) for j in range(J)], make.constant(c, batched=per_sample)), {}
    return build


def _guided(*shape, per_sample=False, x_dtype=None):
    """x and the two halves of a model output with learned variance: the conditional and unconditional means."""
    def build(make):
        B, C = shape[:2]
        x = make("x", *shape, dtype=x_dtype)
        cond, uncond = (make(name, B, 2 * C, *shape[2:])[:, :C] for name in ("cond", "uncond"))
        c = coefficients(B, 1, 3) if per_sample else coefficients(1, 3)
        return ([x, cond, uncond], make.constant(c, batched=per_sample)), {"out_dtypes": (x.dtype,)}
    return build


def _mixed(make):
    dtypes = torch.float32, torch.bfloat16, torch.float16, None
    xs = [make(f"x{j}", 2, 3, 5, 7, dtype=dtype) for j, dtype in enumerate(dtypes)]
    return (xs, make.constant(coefficients(2, 3, 4))), {"out_dtypes": (torch.float16, torch.float32, torch.bfloat16)}


def _strided(make):
    channels_last = make("x0", 2, 6, 5, 3).permute(0, 3, 1, 2)  # [2,3,6,5], the last dimension strided
    rows = make("x1", 2, 3, 12, 9)[:, :, ::2, 2:7]
    expanded = make("x2", 2, 1, 6, 1).expand(-1, 3, -1, 5)
    return ([channels_last, rows, expanded], make.constant(coefficients(1, 3), batched=False)), {}


def _coefficient_slice(make):
    table = coefficients(9, 2, 5)[4, :, :3].t().contiguous().t()  # one step of a table, every stride foreign
    return ([make(f"x{j}", 3, 40) for j in range(3)], make.constant(table, batched=False)), {}


def _seeds(make, B):
    """(seed, step) of each sample, words beyond 32 bits among them."""
    pairs = [[7, 0], [2**40 + 9, 3], [-5, 2**33 + 1]] + [[b, b] for b in range(3, B)]
    return make.constant(torch.tensor(pairs[:B], dtype=torch.int64).reshape(B, 2), batched=True)


def _noise(make):
    xs = [make(f"x{j}", 3, 4, 7, 11) for j in range(2)]
    c = make.constant(coefficients(2, 3), batched=False)
    return (xs, c), {"noise": _seeds(make, 3), "out_dtypes": (torch.float32, xs[1].dtype)}


def _noise_strided(make):
    x = make("x0", 2, 5, 6, 3).permute(0, 3, 1, 2)
    return ([x, make("x1", 2, 3, 1, 12)[..., ::2].expand(-1, -1, 5, -1)],
            make.constant(coefficients(2, 1, 4)[..., 1:].transpose(1, 2).contiguous().transpose(1, 2))), {
        "noise": _seeds(make, 2).t().contiguous().t()}


def _wide(make):
    xs = [make("x0", 2, 4, 20, 8, dtype=torch.float32), make("x1", 2, 4, 20, 8),
          make("x2", 2, 6, 20, 8, dtype=torch.float16)[:, 2:], make("x3", 2, 4, 20, 8, dtype=torch.bfloat16),
          make("x4", 2, 4, 20, 8)]
    return (xs, make.constant(coefficients(2, 2, 6))), {"noise": _seeds(make, 2),
                                                        "out_dtypes": (torch.bfloat16, torch.float32)}


CASES = [Case("sampler_step", name, build, why, grad=grad) for name, build, why, grad in [
    ("ddim_cfg", _guided(3, 4, 8, 8), "x and two channel slices, coefficients shared", "dense"),
    ("ddim_cfg_per_sample", _guided(3, 4, 7, 9, per_sample=True), "one guidance scale per sample", "transposed"),
    ("state_fp32", _guided(2, 3, 10, 6, x_dtype=torch.float32), "float32 state, narrower model output", "dense"),
    ("multistep", _dense(5, 2, 2, 4, 6, 6, per_sample=True), "DPM-Solver-like: two outputs from five", "dense"),
    ("eight_four", _dense(8, 4, 2, 3, 175), "the largest step, ragged tail", "transposed"),
    ("one_one", _dense(1, 1, 3, 17), "a plain scale", "expanded"),
    ("rows_1d", _dense(2, 2, 5, per_sample=True), "nothing but samples", "dense"),
    ("chunks", _dense(2, 1, 2, 9001), "more than one task per run and more than one block", "expanded"),
    ("chunks_per_sample", _dense(2, 2, 2, 9001, per_sample=True), "the same, samples apart", "dense"),
    ("mixed", _mixed, "four dtypes in, three out, per sample", "transposed"),
    ("strided", _strided, "channels last, row and column slices, stride 0", "transposed"),
    ("coefficient_slice", _coefficient_slice, "coefficients with foreign strides", "dense"),
    ("noise", _noise, "ancestral step, noise in the kernel, a group of four across the end", "dense"),
    ("noise_strided", _noise_strided, "noise counts elements of the result, not of the inputs", "expanded"),
    ("wide", _wide, "16-byte accesses in mixed dtypes, noise, two blocks of a sample", "dense"),
    ("no_samples", _dense(2, 1, 0, 4), "zero samples", "dense"),
    ("gradcheck", _dense(3, 2, 2, 3, 2, per_sample=True), "small", "dense"),
]] + [
    Case("sampler_step", f"speed_{'x'.join(map(str, shape))}{suffix}", _guided(*shape, x_dtype=dtype),
         "DDIM with guidance", speed=True)
    for shape in ((8, 4, 32, 32), (2, 16, 128, 128)) for suffix, dtype in (("", None), ("_fp32_state", torch.float32))
]
