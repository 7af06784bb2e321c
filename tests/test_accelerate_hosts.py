"""Accelerated models among other people's code: hooks between blocks, offloading, threads, batches that broadcast."""
import copy
import threading

import pytest
import torch
from torch import nn

import difuse
from difuse_kernels import dispatch

pytest.importorskip("diffusers")
from benchmarks.families import load  # noqa: E402
from benchmarks.families.facebook_dit import DiTBlock  # noqa: E402


def pair(name):
    """(unmodified model, accelerated copy, inputs)."""
    model, inputs = load(name).build(), load(name).inputs(torch.float32)
    ours = copy.deepcopy(model)
    difuse.accelerate(ours)
    return model, ours, inputs


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_gradients_of_what_passes_between_single_blocks(name):
    model, ours, inputs = pair(name)
    seen = []
    for each in (model, ours):
        grads = []
        each.single_transformer_blocks[0].register_full_backward_hook(
            lambda _module, _inputs, outputs, grads=grads: grads.extend(outputs))
        each(**inputs)[0].square().mean().backward()
        seen.append([grad for grad in grads if grad is not None])
    assert len(seen[0]) == len(seen[1]) > 0
    assert all(torch.allclose(mine, eager, atol=1e-6) for eager, mine in zip(*seen, strict=True))


@pytest.mark.parametrize("when", ["before", "after"])
def test_sequential_offloading(when):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = load("flux").build(), load("flux").inputs(torch.float32)
    eager = output(model, inputs)
    if when == "after":
        difuse.accelerate(model)
    model = accelerate.cpu_offload(model, execution_device="cpu")
    if when == "before":
        difuse.accelerate(model)
    assert torch.allclose(output(model, inputs), eager, atol=1e-5)


def test_a_cache_of_diffusers_over_our_forwards():
    hooks = pytest.importorskip("diffusers.hooks")
    model, inputs = load("flux").build(), load("flux").inputs(torch.float32)
    eager = output(model, inputs)
    report = difuse.accelerate(model)
    model.enable_cache(hooks.FirstBlockCacheConfig(threshold=0.0))
    again = difuse.accelerate(model)
    assert again.accelerated == report.accelerated and "under somebody's hook" in difuse.explain(model)
    with model.cache_context("a"):
        assert torch.allclose(output(model, inputs), eager, atol=1e-5)
    with pytest.raises(RuntimeError, match="was wrapped after accelerate"):
        difuse.restore(model)
    model.disable_cache()
    assert difuse.restore(model) == len(report.accelerated)


def test_two_backends_in_two_threads_leave_the_process_as_it_was():
    model, inputs = load("sit").build(), load("sit").inputs(torch.float32)
    models = {backend: copy.deepcopy(model) for backend in ("reference", "cpu")}
    for backend, each in models.items():
        difuse.accelerate(each, backend=backend)
    inside, outside = threading.Event(), threading.Event()

    def first():
        def wait(_module, _args):
            inside.set()
            outside.wait(10)
        models["reference"].blocks[0].attn.register_forward_pre_hook(wait)
        output(models["reference"], inputs)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    difuse.explain_reset()
    output(models["cpu"], inputs)
    assert {line.split()[1] for line in difuse.explain().splitlines()} == {"cpu"}
    outside.set()
    thread.join()
    assert dispatch.forced_backend() == "auto"


def test_an_option_changed_after_accelerate_is_seen_by_the_next_call():
    model, _, inputs = pair("flux")
    difuse.accelerate(model)
    model.transformer_blocks[0].norm2 = nn.LayerNorm(48)
    assert "by now refused: norm2 is LayerNorm" in difuse.explain(model)
    report = difuse.accelerate(model)
    assert "transformer_blocks.0" in report.left_alone and "forward" not in vars(model.transformer_blocks[0])


class OddNorm(nn.LayerNorm):
    """A LayerNorm that computes something else."""

    def forward(self, x):
        return super().forward(x) + 1


def test_norms_of_somebody_else_are_not_bypassed():
    model, _, inputs = pair("flux")
    model.transformer_blocks[0].norm2 = OddNorm(48, elementwise_affine=False)
    norm = model.transformer_blocks[1].norm2
    norm.forward = lambda x: nn.LayerNorm.forward(norm, x) + 1
    eager = output(model, inputs)
    report = difuse.accelerate(model)
    assert set(report.left_alone) == {"transformer_blocks.0"}
    assert torch.allclose(output(model, inputs), eager, atol=1e-5)


@pytest.mark.parametrize("name", ["wan", "qwenimage", "dit", "flux", "hidream", "ltx", "sd3", "sit", "facebook_dit"])
def test_one_timestep_for_the_whole_batch(name):
    model, ours, inputs = pair(name)
    family = load(name)
    inputs = {**inputs, family.time: inputs[family.time][:1]}
    for key in ("pooled_projections", "pooled_embeds", "guidance", "y", "class_labels"):
        if isinstance(inputs.get(key), torch.Tensor):
            inputs[key] = inputs[key][:1]
    try:
        eager = output(model, inputs)
    except (RuntimeError, ValueError):
        pytest.skip("the unmodified model does not broadcast it")
    assert torch.allclose(output(ours, inputs), eager, atol=2e-5)


class Windowed(DiTBlock):
    """Computes something else, but only on more tokens than a short trial has."""

    def forward(self, x, c):
        return super().forward(x * 1.5 if x.shape[1] > 16 else x, c)


class Skipping(DiTBlock):
    """Takes one argument more."""

    def forward(self, x, c, skip=None):
        return super().forward(x, c) + (0 if skip is None else skip)


def test_descendants_of_dit_that_a_short_trial_would_accept():
    report = difuse.accelerate(Windowed(24, 3))
    assert "computes something else" in report.left_alone[""][1]
    block = Skipping(24, 3)
    x, c = torch.randn(2, 4, 24), torch.randn(2, 24)
    eager = block(x, c, skip=x)
    assert difuse.accelerate(block).blocks == (1, 1)
    assert torch.allclose(block(x, c, skip=x), eager) and torch.allclose(block(x=x, c=c), eager - x, atol=1e-5)


@pytest.mark.parametrize("name", ["pixart", "unet", "unet_xl"])
def test_cached_conditioning_gives_the_same_bits(name):
    _, ours, inputs = pair(name)
    eager = output(ours, inputs)
    with difuse.cache_conditioning(ours) as cache:
        assert torch.equal(output(ours, inputs), eager) and cache.hits == 0
        misses = cache.misses
        assert torch.equal(output(ours, inputs), eager) and cache.hits == cache.misses == misses > 0
        inputs = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1}
        changed = output(ours, inputs)
        assert cache.misses == 2 * misses
    assert torch.equal(output(ours, inputs), changed) and not torch.equal(changed, eager)


def test_one_cache_in_two_threads():
    _, ours, inputs = pair("wan")
    prompts = [{**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + i} for i in range(6)]
    eager, wrong = [output(ours, prompt) for prompt in prompts], []

    def work(order):
        try:
            for i in order:
                if not torch.equal(output(ours, prompts[i]), eager[i]):
                    wrong.append(i)
        except Exception as error:  # noqa: BLE001  shown by the assertion below
            wrong.append(error)

    with difuse.cache_conditioning(ours):
        orders = 4 * [0, 1, 2, 3, 4, 5], 4 * [5, 4, 3, 2, 1, 0]
        threads = [threading.Thread(target=work, args=(order,)) for order in orders]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert wrong == []
