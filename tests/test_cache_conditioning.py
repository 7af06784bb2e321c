"""difuse.cache_conditioning: keys and values of cross-attention once per prompt, never stale, bit-equal to without."""
import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import difuse
from difuse.integrations import registry
from difuse.integrations.conditioning import ConditioningCache, cache_conditioning, cached

pytest.importorskip("diffusers")
from benchmarks.families import load  # noqa: E402


@pytest.fixture(params=["wan", "ltx"])
def subject(request):
    """A model of two accelerated blocks, its inputs, and how often it projects keys (calls of to_k)."""
    chosen = load(request.param)
    model, inputs = chosen.build(), chosen.inputs(torch.float32)
    difuse.accelerate(model)
    return Subject(model, inputs)


class Subject:
    """Runs the model and counts the rows that its cross-attentions project to keys."""

    def __init__(self, model, inputs):
        self.model, self.inputs, self.calls = model, inputs, 0
        for name, module in model.named_modules():
            if name.endswith("attn2.to_k"):
                vars(module).pop("forward", None)
                module.__class__, module.subject = Counted, self

    @torch.no_grad()
    def __call__(self, **changed):
        return self.model(**{**self.inputs, **changed})[0]

    def projections(self, **changed):
        """(output, calls of to_k per block) of one forward."""
        before = self.calls
        out = self(**changed)
        return out, (self.calls - before) / 2

    def uncount(self):
        """torch's own Linears again, accelerated: nothing of a test goes into a copy or a compiled graph."""
        for module in self.model.modules():
            if type(module) is Counted:
                module.__class__ = nn.Linear
                del module.subject
        difuse.accelerate(self.model)

    def steps(self):
        """Noisy inputs of three steps."""
        generator = torch.Generator().manual_seed(4)
        return [torch.randn(self.inputs["hidden_states"].shape, generator=generator) for _ in range(3)]


class Counted(nn.Linear):
    """Counts its calls."""

    def forward(self, x):
        self.subject.calls += 1
        return super().forward(x)


def other(prompt):
    """A prompt of the same shape."""
    return torch.randn(prompt.shape, generator=torch.Generator().manual_seed(9))


def test_projected_once_per_trajectory_and_bit_equal(subject):
    plain = [subject(hidden_states=x) for x in subject.steps()]
    assert subject.calls == 6
    with cache_conditioning(subject.model) as cache:
        for x, expected in zip(subject.steps(), plain, strict=True):
            assert torch.equal(subject(hidden_states=x), expected)
    assert subject.calls == 6 + 2 and (cache.hits, cache.misses) == (4, 2)
    assert subject.projections()[1] == 1  # after the end as before
    assert not subject.model._forward_pre_hooks and not subject.model._forward_hooks


def test_a_plain_call_ends_with_restore(subject):
    cache = cache_conditioning(subject.model)
    subject()
    held = [weakref.ref(k) for kept in cache._kept.values() for pair in kept.results.values()
            for k in (pair if isinstance(pair[0], torch.Tensor) else pair[0])]
    assert held and all(tensor() is not None for tensor in held) and subject.projections()[1] == 0
    cache.restore()
    assert not cache._kept and all(tensor() is None for tensor in held) and subject.projections()[1] == 1


def test_an_equal_prompt_hits_and_a_changed_one_does_not(subject):
    prompt = subject.inputs["encoder_hidden_states"]
    expected, changed = subject(), subject(encoder_hidden_states=other(prompt))
    with cache_conditioning(subject.model):
        subject()
        found, calls = subject.projections(encoder_hidden_states=prompt.clone())
        assert calls == 0 and torch.equal(found, expected)
        found, calls = subject.projections(encoder_hidden_states=other(prompt))
        assert calls == 1 and torch.equal(found, changed)
        shorter = prompt[:, :5]
        options = {"encoder_attention_mask": subject.inputs["encoder_attention_mask"][:, :5]} if (
            "encoder_attention_mask" in subject.inputs) else {}
        assert subject.projections(encoder_hidden_states=shorter, **options)[1] == 1


@pytest.mark.parametrize("through_data", [False, True])
def test_a_prompt_edited_in_place(subject, through_data):
    prompt = subject.inputs["encoder_hidden_states"]
    changed = subject(encoder_hidden_states=other(prompt))
    with cache_conditioning(subject.model):
        subject()
        (prompt.data if through_data else prompt).copy_(other(prompt))
        found, calls = subject.projections()
    assert calls == 1 and torch.equal(found, changed)


class Direct(nn.Module):
    """A cross-attention's keys of a conditioning that comes as the user holds it, as a UNet's does."""

    def __init__(self):
        super().__init__()
        self.to_k = nn.Linear(8, 8)

    def forward(self, context):
        """[B,T,8] -> [B,T,8]."""
        return self.to_k(context)


def direct(self, context):
    """Direct's forward."""
    return cached(self, context, lambda: self.to_k(context))


def test_a_conditioning_that_no_layer_projects_first(monkeypatch):
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    monkeypatch.setattr(registry, "_forwards", dict(registry._forwards))
    difuse.integrations.register(Direct)(direct)
    model, context = nn.Sequential(Direct()), torch.randn(2, 3, 8)
    difuse.accelerate(model)
    with cache_conditioning(model) as cache, torch.no_grad():
        first = model(context)
        assert torch.equal(model(context), first) and (cache.hits, cache.misses) == (1, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(context).dtype == torch.bfloat16 and model(context).dtype == torch.bfloat16
        assert model(context).dtype == torch.float32 and (cache.hits, cache.misses) == (3, 2)
        for edited in (context, context.data):
            edited.mul_(2)
            assert torch.equal(model(context), model[0].to_k(context))
        assert (cache.hits, cache.misses) == (3, 4)
        with torch.inference_mode():
            context = context.clone()
            model(context)
            context.mul_(2)
            assert torch.equal(model(context), model[0].to_k(context))


def test_two_alternating_prompts_hit_and_a_fifth_replaces_the_oldest(subject):
    prompt = subject.inputs["encoder_hidden_states"]
    prompts = [prompt + i for i in range(6)]
    plain = [subject(encoder_hidden_states=p) for p in prompts]
    with cache_conditioning(subject.model) as cache:
        for step in range(3):
            for p, expected in zip(prompts[:2], plain[:2], strict=True):
                found, calls = subject.projections(encoder_hidden_states=p)
                assert calls == (step == 0) and torch.equal(found, expected)
        for i in (2, 3, 0, 4):  # 1 is the least recently used
            found, calls = subject.projections(encoder_hidden_states=prompts[i])
            assert calls == (i != 0) and torch.equal(found, plain[i])
        assert len(cache._conditionings) == 4
        assert all(len(kept.results) == 4 for kept in cache._kept.values())
        for i, missed in ((0, 0), (2, 0), (3, 0), (4, 0), (1, 1)):
            found, calls = subject.projections(encoder_hidden_states=prompts[i])
            assert calls == missed and torch.equal(found, plain[i])


def of_cross_attention(model):
    """Its modules that project conditionings; were others changed, the conditioning would be another too."""
    return [module for name, module in model.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]


def load_state_dict(modules):
    """New weights by load_state_dict."""
    for module in modules:
        module.load_state_dict({name: value * 1.5 for name, value in module.state_dict().items()})


def optimizer_step(modules):
    """New weights by an optimizer's step over all of them at once."""
    weights = [weight for module in modules for weight in module.parameters()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(weights, lr=0.1, foreach=True).step()


def through_data(modules):
    """New weights as an EMA copies them in, past autograd's version counters."""
    for module in modules:
        module.weight.data.copy_(module.weight.data * 1.5)


def new_parameters(modules):
    """Parameters replaced by others."""
    for module in modules:
        module.weight = nn.Parameter(module.weight.detach() * 1.5)


def new_memory(modules):
    """Twice new memory behind the same parameters, which may be the old address again."""
    for module in modules:
        module.weight.data = module.weight.data * 1.5
        module.weight.data = module.weight.data * 1.5


@pytest.mark.parametrize("change", [load_state_dict, optimizer_step, through_data, new_parameters, new_memory])
def test_changed_weights(subject, change):
    with cache_conditioning(subject.model):
        subject()
        assert subject.projections()[1] == 0
        change(of_cross_attention(subject.model))
        found, calls = subject.projections()
    assert calls == 1 and torch.equal(found, subject())


def test_only_the_norms_weight_changes(subject):
    with cache_conditioning(subject.model):
        subject()
        with torch.no_grad():
            for name, weight in subject.model.named_parameters():
                if name.endswith("attn2.norm_k.weight"):
                    weight.mul_(1.5)
        found, calls = subject.projections()
    assert calls == 1 and torch.equal(found, subject())


def test_lora_added_scaled_switched_merged_and_removed(subject):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import LoraLayer
    difuse.restore(subject.model)
    plain = copy.deepcopy(subject.model)
    model = subject.model = plain
    difuse.accelerate(model)
    config = {"r": 2, "target_modules": ["to_k", "to_v"], "init_lora_weights": False}

    def layers():
        return [module for module in model.modules() if isinstance(module, LoraLayer)]

    def attach(name):
        torch.manual_seed(len(name))
        peft.inject_adapter_in_model(peft.LoraConfig(**config), model, adapter_name=name)

    changes = [lambda: attach("a"), lambda: [layer.scale_layer(0.5) for layer in layers()],
               lambda: [layer.unscale_layer() for layer in layers()], lambda: attach("second"),
               lambda: [layer.set_adapter("second") for layer in layers()],
               lambda: [layer.enable_adapters(False) for layer in layers()],
               lambda: [layer.enable_adapters(True) for layer in layers()],
               lambda: [layer.merge() for layer in layers()], lambda: [layer.unmerge() for layer in layers()]]
    with cache_conditioning(model) as cache:
        subject()
        results = []
        for change in changes:
            change()
            found, hits = subject(), cache.hits
            assert torch.equal(subject(), found) and cache.hits == hits + 2
            cache.clear()
            assert torch.equal(subject(), found)
            results.append(found)
        first, scaled, unscaled, _, second, off, on, merged, _ = results
        assert torch.equal(first, unscaled) and torch.equal(second, on)
        assert not any(torch.equal(first, each) for each in (scaled, second, off)) and not torch.equal(merged, off)


def test_the_scale_of_lora_within_one_forward():
    peft = pytest.importorskip("peft")
    chosen = load("wan")
    model, inputs = chosen.build(), chosen.inputs(torch.float32)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    difuse.accelerate(model)

    @torch.no_grad()
    def run(scale):
        return model(**inputs, attention_kwargs={"scale": scale})[0]

    plain = [run(scale) for scale in (1.0, 0.5)]
    assert not torch.equal(*plain)
    with cache_conditioning(model):
        for _ in range(2):
            assert all(torch.equal(run(scale), found) for scale, found in zip((1.0, 0.5), plain, strict=True))


def test_not_with_gradients(subject):
    with cache_conditioning(subject.model) as cache:
        subject()
        model, inputs = subject.model, subject.inputs
        model(**inputs)[0].sum().backward()
        weights = [weight for name, weight in model.named_parameters() if "attn2.to_k" in name]
        assert weights and all(weight.grad is not None and weight.grad.any() for weight in weights)
        assert cache.hits == 0


def test_not_with_dropout_hooks_autocast_or_another_backend(subject):
    model, fired = subject.model, []
    with cache_conditioning(model):
        expected = subject()
        handle = model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("attn2.to_v"))
                                     ).register_forward_hook(lambda *_: fired.append(1))
        assert subject.projections()[1] == 0.5 and fired
        handle.remove()
        assert subject.projections()[1] == 0.5 and torch.equal(subject(), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert subject.projections()[1] == 1 and subject.projections()[1] == 0
        with difuse.use_backend("reference"):
            assert subject.projections()[1] == 1
        assert subject.projections()[1] == 0 and torch.equal(subject(), expected)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        model.train()
        assert subject.projections()[1] == 1 and subject.projections()[1] == 1


def test_inference_mode_and_back(subject):
    expected = subject()
    with cache_conditioning(subject.model):
        with torch.inference_mode():
            first = subject.model(**subject.inputs)[0]
        assert torch.equal(first, expected) and torch.equal(subject(), expected)
        subject.model(**subject.inputs)[0].sum().backward()


def test_copies_and_pickles_carry_nothing(subject):
    subject.uncount()
    size = len(pickle.dumps(subject.model))
    with cache_conditioning(subject.model) as cache:
        expected = subject()
        saved = pickle.dumps(subject.model)
        assert len(saved) < size + 500 and cache._kept
        for twin in (copy.deepcopy(subject.model), pickle.loads(saved)):
            with torch.no_grad():
                assert torch.equal(twin(**subject.inputs)[0], expected)
                assert torch.equal(twin(**subject.inputs)[0], expected)
            caches = [hook.__self__ for hook in twin._forward_hooks.values()]
            assert all(isinstance(each, ConditioningCache) and not each._kept and each.misses == 0 for each in caches)


def test_an_error_inside_a_forward_ends_it(subject):
    with cache_conditioning(subject.model) as cache:
        with pytest.raises((RuntimeError, ValueError)):
            subject(hidden_states=torch.ones(1, 2))
        attn = next(module for name, module in subject.model.named_modules() if name.endswith("attn2"))
        with torch.no_grad():  # outside the model's forward nothing is kept
            attn(torch.ones(1, 3, attn.to_q.in_features), torch.ones(1, 4, attn.to_k.in_features))
        assert (cache.hits, cache.misses) == (0, 0)


def test_compiled(subject):
    subject.uncount()
    expected = subject()
    with cache_conditioning(subject.model) as cache, torch.no_grad():
        torch._dynamo.reset()
        found = torch.compile(subject.model, fullgraph=True, backend="aot_eager")(**subject.inputs)[0]
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max() and cache.misses == 0
        subject()
        assert cache.misses == 2


def test_refusals():
    with pytest.raises(TypeError, match="expected a module"):
        cache_conditioning("pipe")
    with pytest.raises(ValueError, match="difuse.accelerate"):
        cache_conditioning(nn.Linear(2, 2))


def test_restoring_the_model_ends_its_caches(subject):
    cache = cache_conditioning(subject.model)
    subject()
    difuse.restore(subject.model)
    assert not subject.model._forward_pre_hooks and not subject.model._forward_hooks and not cache._conditionings
