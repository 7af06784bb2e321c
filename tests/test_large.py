"""Offsets beyond 2^31 elements: views with huge strides into memory that is reserved and hardly touched."""
import pytest
import torch

import difuse_kernels
from difuse_kernels.testing.numerics import backends_here, device_of

ELEMENTS = 2**32 + 2**10
TOKEN = 2**26  # 32 tokens on, both factors of the offset fit 32 bits and their product does not


@pytest.fixture(scope="module")
def reserved():
    """8.6 GB of bfloat16 address space per device, asked for once; pages that nobody touches cost nothing."""
    made = {}

    def memory(device):
        if device not in made:
            try:
                made[device] = torch.empty(ELEMENTS, dtype=torch.bfloat16, device=device)
            except RuntimeError as error:
                pytest.skip(f"8.6 GB of address space are not to be had: {error}")
        return made[device]

    return memory


def _embedded(x, m, run):
    """x as the embedding [2,24]: the image is dense, and one of 2^31 elements is more than a test has room for."""
    return run(m.reshape(2, 24, 1).expand(2, 24, 5).contiguous(), 4, add=x[:, 32])


# gelu_tanh takes contiguous tensors alone, and one of 2^31 elements is more than a test has room for
CASES = {  # op -> call on x [2,33,24], or on heads in it, and m [2,24]
    "norm_modulate": lambda x, m, run: run(x, m, m),
    "gate_residual": lambda x, m, run: run(x, x, m),
    "gate_residual_norm_modulate": lambda x, m, run: run(x, x, m, m, m),
    "norm_modulate_dual": lambda x, m, run: run(x, m, m, m, m),
    "gated_activation": lambda x, m, run: run(x),
    "gram": lambda x, m, run: run([x, x.flip(0)]),
    "group_norm_act": _embedded,
    "attention": lambda x, m, run: run(*x.unflatten(2, (3, 1, 8)).unbind(2)),
    "attention_packed": lambda x, m, run: run(x.unflatten(2, (3, 1, 8))),
    "qk_norm_rope": lambda x, m, run: run(*x.unflatten(2, (3, 1, 8)).unbind(2)[:2]),
    "qk_norm_rope_joint": lambda x, m, run: run([difuse_kernels.Stream(*x.unflatten(2, (3, 1, 8)).unbind(2))] * 2),
    "patchify": lambda x, m, run: run(x.unflatten(1, (1, -1)), (1, 4)),
    "unpatchify": lambda x, m, run: run(x, (2, 2), (1, x.shape[1])),
    "sampler_step": lambda x, m, run: run([x, x], torch.tensor([[0.5, 0.25]], device=x.device)),
}


@pytest.mark.parametrize("op, backend", [(op, b) for op in CASES for b in backends_here(op) if b != "reference"])
def test_offsets_beyond_two_to_the_31(op, backend, reserved):
    """Forward and backward, against the same numbers in a small dense tensor, bit for bit."""
    far = reserved(device_of(backend)).as_strided((2, 33, 24), (2**31, TOKEN, 1))
    far.copy_(torch.randn(2, 33, 24, generator=torch.Generator().manual_seed(0)))
    m = torch.linspace(-1, 1, 48, device=far.device).view(2, 24).to(far.dtype)
    results = []
    for x in (far, far.contiguous()):
        x = x.detach().requires_grad_()
        outputs = CASES[op](x, m, lambda *args, **more: getattr(difuse_kernels, op)(*args, **more, backend=backend))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
        results.append([*(out.detach() for out in outputs), x.grad])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
