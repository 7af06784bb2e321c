"""What is special to group_norm_act: the models' own formulas, memory formats, edges, refusals."""
import pytest
import torch
import torch.nn.functional as F

from difuse_kernels import dispatch, explain, explain_reset, group_norm_act
from difuse_kernels.testing.numerics import backends_here, device_of

KERNELS = [name for name in backends_here("group_norm_act") if name != "reference"]
each_backend = pytest.mark.parametrize("backend", backends_here("group_norm_act"))
each_kernel = pytest.mark.parametrize("backend", KERNELS)


def draw(*shape, seed=0, mean=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean


def last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@each_backend
@pytest.mark.parametrize("spatial", [(5,), (4, 6), (3, 2, 5)], ids=str)
@pytest.mark.parametrize("lies", [torch.Tensor.contiguous, last], ids=["contiguous", "channels_last"])
def test_formula(spatial, lies, backend):
    x, add, weight, bias = draw(2, 12, *spatial), draw(2, 12, seed=1), draw(12, seed=2), draw(12, seed=3)
    device = device_of(backend)
    expected = F.silu(F.group_norm(x + add.reshape(2, 12, *(1 for _ in spatial)), 3, weight, bias, 1e-4))
    found = group_norm_act(lies(x.to(device)), 3, weight.to(device), bias.to(device), add=add.to(device),
                           activation="silu", eps=1e-4, backend=backend)
    torch.testing.assert_close(found.cpu(), expected, rtol=3e-6, atol=3e-6)
    assert lies(found).stride() == found.stride(), "the memory format was not kept"


def test_diffusers_own_block():
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(in_channels=32, temb_channels=16, groups=8).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, temb = draw(2, 32, 6, 5), draw(2, 16, seed=1)
    h = block.conv1(group_norm_act(x, 8, block.norm1.weight, block.norm1.bias, activation="silu", eps=block.norm1.eps))
    h = group_norm_act(h, 8, block.norm2.weight, block.norm2.bias, add=block.time_emb_proj(F.silu(temb)),
                       activation="silu", eps=block.norm2.eps)
    torch.testing.assert_close(x + block.conv2(h), block(x, temb), rtol=1e-4, atol=1e-4)


@each_kernel
@pytest.mark.parametrize("lies", [torch.Tensor.contiguous, last], ids=["contiguous", "channels_last"])
def test_gradients_keep_the_memory_format_and_take_any(lies, backend):
    x = lies(draw(2, 6, 4, 3).to(device_of(backend))).requires_grad_()
    grad = draw(2, 6, 4, 3, seed=1).to(x.device)
    found = [torch.autograd.grad(group_norm_act(x, 2, activation="silu", backend=backend), x, incoming)[0]
             for incoming in (grad, last(grad), grad.mT.contiguous().mT)]
    assert all(dx.stride() == x.stride() and torch.equal(dx, found[0]) for dx in found)


@each_kernel
@pytest.mark.parametrize("needed", ["x", "add", "weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lies", [torch.Tensor.contiguous, last], ids=["contiguous", "channels_last"])
def test_one_gradient_alone_has_the_bits_of_all(lies, dtype, needed, backend):
    shapes = dict(x=(2, 6, 4, 3), add=(2, 6), weight=(6,), bias=(6,))
    leaves = {name: draw(*shape).to(device_of(backend), dtype) for name, shape in shapes.items()}
    leaves["x"] = lies(leaves["x"])

    def gradients(*names):
        given = {name: leaf.detach().requires_grad_(name in names) for name, leaf in leaves.items()}
        out = group_norm_act(groups=2, activation="silu", backend=backend, **given)
        return dict(zip(names, torch.autograd.grad(out.square().sum(), [given[name] for name in names]), strict=True))

    assert torch.equal(gradients(needed)[needed], gradients(*shapes)[needed])


@each_backend
@pytest.mark.parametrize("z", [90.0, 1000.0, 3e38])
def test_silu_beyond_the_range_of_exp(z, backend):
    """bias carries z there: slopes of 0 and 1, values of 0 and z."""
    bias = torch.tensor([z, -z], device=device_of(backend), requires_grad=True)
    out = group_norm_act(torch.zeros(1, 2, 3, device=bias.device), 1, bias=bias, activation="silu", backend=backend)
    (slope,) = torch.autograd.grad(out.sum(), bias)
    torch.testing.assert_close(out[0, :, 0].detach().cpu(), torch.tensor([z, 0.0]))
    torch.testing.assert_close(slope.cpu(), torch.tensor([3.0, 0.0]))


@each_backend
def test_what_is_no_number_stays_in_its_group(backend):
    x = draw(2, 4, 5).to(device_of(backend))
    x[0, 1, 2] = torch.nan
    out = group_norm_act(x, 2, activation="silu", backend=backend)
    assert torch.isnan(out[0, :2]).all() and torch.isfinite(out[0, 2:]).all() and torch.isfinite(out[1]).all()


@each_kernel
@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_large_means_leave_the_deviations_their_digits(mean, backend):
    """Of numbers that lie far from zero the statistics are as good as the numbers."""
    x = draw(1, 4, 33, 65, mean=mean).to(device_of(backend))
    expected = group_norm_act(x.double(), 2, backend="reference")
    for lies in (torch.Tensor.contiguous, last):
        found = group_norm_act(lies(x), 2, backend=backend)
        assert (found - expected).abs().max() < abs(mean) * 1.2e-7  # a unit of the mean


@each_backend
def test_no_position_and_no_sample(backend):
    for shape in ((2, 4, 0, 3), (0, 4, 2, 3)):
        leaves = [torch.ones(s, device=device_of(backend), requires_grad=True) for s in (shape, 4, 4, (shape[0], 4))]
        x, weight, bias, add = leaves
        out = group_norm_act(x, 2, weight, bias, add=add, backend=backend)
        assert out.shape == shape
        if backend != "reference":  # which says nan, as eager PyTorch does, where there is no mean
            assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.skipif("cpu" not in KERNELS, reason="the native module is not built")
def test_sliced_images_run_on_the_reference_in_sight(monkeypatch):
    x = draw(2, 8, 5, 6)[:, :, 1:]
    explain_reset()
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(UserWarning, match="group_norm_act runs on 'reference', not on 'cpu': x is neither contiguous"):
        found = group_norm_act(x, 2)
    assert "x is neither contiguous nor channels_last; call .contiguous() on it" in explain()
    torch.testing.assert_close(found, group_norm_act(x.contiguous(), 2), rtol=3e-6, atol=3e-6)


BAD = [
    (lambda x: group_norm_act(x, 3), ValueError, "groups is 3 and x has 8 channels; expected a divisor of 8"),
    (lambda x: group_norm_act(x, 0), ValueError, "groups is 0 and x has 8 channels"),
    (lambda x: group_norm_act(x[:, :0], 1), ValueError, "groups is 1 and x has 0 channels"),
    (lambda x: group_norm_act(x, 2.0), TypeError, "groups is 2.0; expected an int"),
    (lambda x: group_norm_act(x[:, :, 0, 0], 2), ValueError, r"x has shape \(2, 8\); expected \[B,C,\*spatial\]"),
    (lambda x: group_norm_act(x.long(), 2), TypeError, "x has dtype torch.int64; expected a floating dtype"),
    (lambda x: group_norm_act(x, 2, add=x[:1, :, 0, 0]), ValueError, r"add has shape \(1, 8\); expected \(2, 8\)"),
    (lambda x: group_norm_act(x, 2, x[0, :4, 0, 0]), ValueError, r"weight has shape \(4,\); expected \(8,\)"),
    (lambda x: group_norm_act(x, 2, bias=[0.0] * 8), TypeError, "bias is list; expected a tensor or None"),
    (lambda x: group_norm_act(x, 2, activation="gelu"), ValueError, "activation is 'gelu'; expected one of 'none'"),
    (lambda x: group_norm_act(x, 2, backend="fast"), ValueError, "backend 'fast' is unknown"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(draw(2, 8, 3, 4))


@each_kernel
def test_what_kernels_refuse_is_named(backend):
    x = draw(2, 8, 3, 4).to(device_of(backend))
    with pytest.raises(RuntimeError, match=f"{backend}: input 0 has dtype torch.float64"):
        group_norm_act(x.double(), 2, backend=backend)
    with pytest.raises(RuntimeError, match=f"{backend}: x is neither contiguous nor channels_last; call .contiguous"):
        group_norm_act(x.mT, 2, backend=backend)
    with pytest.raises(RuntimeError, match=f"{backend}: the last dimension of input 2 is strided; call .contiguous"):
        group_norm_act(x, 2, x.new_ones(16)[::2], backend=backend)
