"""difuse.accelerate on every family of models, against the unmodified model: the same results, weights and habits."""
import copy
import functools
import io
import pickle
import statistics

import pytest
import torch
from torch import nn

import difuse
from difuse.integrations import products
from difuse_kernels.testing.numerics import OUTLIER

pytest.importorskip("diffusers")
from benchmarks.families import NAMES, load  # noqa: E402
from benchmarks.families.proofs import (  # noqa: E402
    Truth,
    cast,
    differentiable,
    distance,
    forward_and_gradients,
    judge,
    psnr,
    tensors,
    training_losses,
    trajectory,
    truth,
)

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=NAMES)
def subject(request):
    """A family of models."""
    return load(request.param)


@torch.no_grad()
def run(model, inputs):
    """The model's first output."""
    return tensors(model(**inputs))[0]


def state(model):
    """What must not change: names, dtypes and places of everything that is saved."""
    return {key: (value.dtype, value.shape, value.data_ptr()) for key, value in model.state_dict().items()}


def gradients(model, inputs):
    """Output and parameter gradients by name."""
    return forward_and_gradients(model, (), inputs, ())


def near(ours, eager):
    """Whether two float32 results differ by rounding alone."""
    return (ours - eager).abs().max() <= 2e-5 * eager.abs().max()


def same(ours, eager):
    """Whether two results of forward_and_gradients in float32 differ by rounding alone.

    A small gradient, e.g. of a key's bias, which is zero but for rounding, is what is left of sums of the usual size:
    it is compared with a tenth of that. The error budget is another test's.
    """
    usual = statistics.median(value.abs().max() for value in eager.values())
    return ours.keys() == eager.keys() and all(
        (ours[key] - eager[key]).abs().max() <= 2e-5 * max(eager[key].abs().max(), 0.1 * usual) for key in eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_within_the_error_budget(subject, dtype):
    found = judge(subject, DTYPES[dtype])
    assert found.ok, found


def test_autocast_within_the_error_budget(subject):
    found = judge(subject, torch.bfloat16, autocast=True)
    assert found.ok, found


def test_a_trajectory_of_twenty_steps(subject):
    if subject.time is None:
        pytest.skip("no model of a trajectory")
    model = subject.build()
    eager = trajectory(subject, model)
    difuse.accelerate(model)
    ours = trajectory(subject, model)
    assert torch.isfinite(eager).all() and psnr(ours, eager) >= 60


def test_fifty_training_steps(subject):
    model = subject.build().train()
    ours = copy.deepcopy(model)
    difuse.accelerate(ours)
    torch.manual_seed(0)
    with Truth():
        true = training_losses(subject, copy.deepcopy(model).double(), torch.float64)
    torch.manual_seed(0)
    ours = training_losses(subject, ours)
    torch.manual_seed(0)
    eager = training_losses(subject, model)
    error, eager_error = ((each - true).abs().max() for each in (ours, eager))
    assert eager[-1] < eager[0] and error <= OUTLIER * eager_error + 1e-6 * true.max(), (error, eager_error)


def test_only_forwards_of_this_instance_change_and_restore_brings_them_back(subject):
    model, other, inputs = subject.build(), subject.build(), subject.inputs(torch.float32)
    classes = {type(module): dict(vars(type(module))) for module in model.modules()}
    before, places = run(model, inputs), state(model)
    report = difuse.accelerate(model)
    assert report.blocks == (subject.blocks, subject.blocks), str(report)
    assert len(report.left_alone) == subject.left_alone
    assert f"{subject.blocks} of {subject.blocks} blocks" in str(report)
    ours = run(model, inputs)
    assert near(ours, before) and state(model) == places
    assert all(dict(vars(cls)) == entries for cls, entries in classes.items())
    assert torch.equal(run(other, inputs), before)
    assert not any("forward" in vars(module) for module in other.modules())
    again = difuse.accelerate(model)
    assert again.accelerated == report.accelerated and torch.equal(run(model, inputs), ours)
    assert difuse.restore(model) == len(report.accelerated) and difuse.restore(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(run(model, inputs), before) and state(model) == places


def test_the_fused_ops_run(subject):
    model, inputs = subject.build(), subject.inputs(torch.float32)
    difuse.accelerate(model)
    difuse.explain_reset()
    run(model, inputs)
    text = difuse.explain(model)
    assert text.count("its own forward") == subject.left_alone, text
    ran = difuse.explain()
    named = {op for line in text.split("ops so far:")[0].splitlines()[1:] for op in line.replace(",", " ").split()}
    here = {line.split()[0] for line in ran.splitlines()}
    assert named & here and (subject.left_alone or here & {"attention", "attention_packed"}), ran
    assert "reference" not in ran.replace("not reference", ""), ran


def test_every_backend_by_name(subject):
    model, inputs = subject.build(), subject.inputs(torch.float32)
    before = run(model, inputs)
    for backend in ("reference", "cpu"):
        difuse.accelerate(model, backend=backend)
        difuse.explain_reset()
        assert near(run(model, inputs), before)
        assert {line.split()[1] for line in difuse.explain().splitlines()} == {backend}


def test_gradient_checkpointing_gives_the_same_bits(subject):
    model, inputs = subject.build(), subject.inputs(torch.float32)
    difuse.accelerate(model)
    model.train()
    [module.eval() for module in model.modules() if "Embed" in type(module).__name__]  # these drop labels
    plain = gradients(model, inputs)
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
    else:
        model.forward = functools.partial(torch.utils.checkpoint.checkpoint, model.forward, use_reentrant=False)
    found = gradients(model, inputs)
    assert found.keys() == plain.keys() and all(torch.equal(found[key], plain[key]) for key in plain)


def test_dropout_draws_what_it_drew(subject):
    model, inputs = subject.build(), subject.inputs(torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model.train()
    ours = copy.deepcopy(model)
    difuse.accelerate(ours)
    torch.manual_seed(2)
    eager = gradients(model, inputs)
    torch.manual_seed(2)
    assert same(gradients(ours, inputs), eager)


def test_compiled_in_one_graph(subject):
    model, inputs = subject.build(), subject.inputs(torch.float32)
    before = run(model, inputs)
    difuse.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert near(run(compiled, inputs), before)
    ours = gradients(model, inputs)
    assert same({key.replace("_orig_mod.", ""): value for key, value in gradients(compiled, inputs).items()}, ours)


def test_copies_pickles_and_files(subject, tmp_path):
    model, inputs = subject.build(), subject.inputs(torch.float32)
    difuse.accelerate(model)
    before = run(model, inputs)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(1)  # a twin that still read the original's weights would change
        assert torch.equal(run(twin, inputs), before)
        with torch.no_grad():
            for weight, value in zip(model.parameters(), twin.parameters(), strict=True):
                weight.copy_(value)
        assert difuse.restore(twin) > 0 and near(run(twin, inputs), before)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert not any("forward" in vars(module) for module in loaded.modules())
        assert near(run(loaded, inputs), before)


def test_hooks_fire(subject):
    model, inputs = subject.build(), subject.inputs(torch.float32)
    report = difuse.accelerate(model)
    before = run(model, inputs)
    calls, handles = [], []
    for path, module in model.named_modules():
        if path in report.accelerated or isinstance(module, nn.LayerNorm | nn.RMSNorm):
            handles.append(module.register_forward_hook(lambda *_, path=path: calls.append(path)))
    hooked = run(model, inputs)
    assert near(hooked, before)
    for handle in handles:
        handle.remove()
    ours, calls[:] = list(calls), []
    difuse.restore(model)
    for path, module in model.named_modules():
        if path in report.accelerated or isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    run(model, inputs)
    assert sorted(ours) == sorted(calls)


def adapted(model, subject, seed):
    """A LoRA adapter of random weights on the model, in place."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(subject.lora)), f"lora{seed}")
    fill(wrapped, seed)
    return wrapped


def fill(wrapped, seed):
    """Random weights for the adapter of this seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        found = [p for name, p in wrapped.named_parameters() if f".lora{seed}." in name]
        for weight in found:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    assert found


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_added_switched_and_removed(subject, order):
    peft = pytest.importorskip("peft")
    inputs = subject.inputs(torch.float32)
    results = []
    for fused in (False, True):
        model = subject.build()
        plain = run(model, inputs)
        if fused and order == "after":
            difuse.accelerate(model)
        wrapped = adapted(model, subject, 0)
        if fused and order == "before":
            report = difuse.accelerate(wrapped)
            assert report.blocks == (subject.blocks, subject.blocks), str(report)
        found = [run(wrapped, inputs)]
        found.append(gradients(wrapped, inputs))
        wrapped.add_adapter("lora1", peft.LoraConfig(r=3, target_modules=list(subject.lora)))
        fill(wrapped, 1)
        wrapped.set_adapter("lora1")
        found.append(run(wrapped, inputs))
        with wrapped.disable_adapter():
            found.append(run(wrapped, inputs))
        found.append(run(wrapped.unload(), inputs))
        assert near(found[-1], plain) and near(found[-2], plain)
        assert not near(found[0], plain) and not near(found[2], found[0])
        results.append(found)
    for eager, ours in zip(*results, strict=True):
        assert same(ours, eager) if isinstance(eager, dict) else near(ours, eager)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_wide_block_within_the_error_budget(name, dtype):
    block, args, kwargs = next(iter(load(name).wide.values()))(DTYPES[dtype])
    if dtype == "bf16" and any(isinstance(module, nn.Conv2d) for module in block.modules()):
        pytest.skip("eager's bfloat16 convolution takes minutes on a CPU that emulates it")
    streams = {"hidden_states", "encoder_hidden_states", "x", "input_tensor"} if dtype == "fp32" else ()
    kwargs = {key: value * 0.01 if key in streams and value is not None else value  # so small that a wrong eps shows
              for key, value in kwargs.items()}
    names = differentiable(kwargs)
    ours = copy.deepcopy(block)
    assert difuse.accelerate(ours).blocks == (1, 1) and names
    for module in block.modules():  # an emulated product gives the same (test_products.py) and takes minutes
        if type(module) is nn.Linear and dtype == "bf16":
            module.forward = functools.partial(products.linear, module)
    found, eager = (forward_and_gradients(each, args, kwargs, names) for each in (ours, block))
    judged = distance(found, eager, truth(block, args, kwargs, names), DTYPES[dtype])
    assert judged.ok, judged


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_budget_notices_lost_and_wrong_gradients(subject, dtype):
    dtype = DTYPES[dtype]
    model, inputs = subject.build().to(dtype), subject.inputs(dtype)
    eager, true = gradients(model, inputs), truth(model, (), inputs, ())
    assert distance(eager, eager, true, dtype).ok
    zeros = {key: value * (0 if key.startswith("grad") else 1) for key, value in eager.items()}
    assert not distance(zeros, eager, true, dtype).ok
    biggest = max((key for key in eager if key.startswith("grad")), key=lambda key: eager[key].square().mean())
    assert not distance({**eager, biggest: -eager[biggest]}, eager, true, dtype).ok


def test_cast_keeps_what_is_no_float():
    values = {"a": torch.ones(1), "b": [torch.ones(1, dtype=torch.int64), None]}
    found = cast(values, torch.bfloat16)
    assert found["a"].dtype == torch.bfloat16 and found["b"][0].dtype == torch.int64 and found["b"][1] is None
