"""Frozen models on a GPU: calls recorded once per shape, replayed on other values, and nothing stale.

Without a GPU `record` is replaced by a stand-in that runs the function again: buffers, keys and refusals are the same.
"""
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import difuse
from difuse.diffusion import VP
from difuse.inference import freeze as freeze_module
from difuse.inference import graphs
from difuse.integrations.parts import must_not_wait
from tests.tiny_training import tiny_model

pytest.importorskip("diffusers")
from benchmarks.families import NAMES, load  # noqa: E402  needs diffusers
from benchmarks.families.proofs import tensors  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def model():
    return tiny_model().eval().to(DEVICE)


def freeze(model):
    return difuse.freeze(model) if HAS_GPU else freeze_module.record(model)


def call(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(batch, 1, 4, 4, generator=generator), torch.randint(0, 1000, (batch,), generator=generator)
    return [each.to(DEVICE) for each in (x, t, torch.arange(batch) % 3)]


def out(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def close(found, expected):  # a product may take another algorithm while it is recorded
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_recorded_and_replayed_with_other_values(name, records, monkeypatch):
    model = load(name).build().eval().to(DEVICE)
    inputs = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
              for key, value in load(name).inputs(torch.float32).items()}
    frozen = freeze(model)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if HAS_GPU and name == "hidream":  # its model builds tensors from Python numbers in every call
        with pytest.raises(RuntimeError, match="must not read values back"):
            out(frozen, **inputs)
        return
    for scale in (1.0, 0.5, -1.0):
        inputs = {key: value * scale if isinstance(value, torch.Tensor) and value.is_floating_point() and key in (
            "x", "hidden_states", "sample") else value for key, value in inputs.items()}
        found, expected = out(frozen, **inputs), out(model, **inputs)
        assert type(found) is type(expected)
        close(tensors(found)[0], tensors(expected)[0])
    assert len(records) == 1 and not any("forward" in vars(module) for module in model.modules())


def test_weights_are_the_models_and_what_is_done_to_them_in_place_is_seen(model, records):
    frozen = freeze(model)
    assert all(ours is theirs for ours, theirs in zip(frozen.parameters(), model.parameters(), strict=True))
    before = out(frozen, *call())
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(2)
    close(out(frozen, *call()), out(model, *call()))
    assert len(records) == 1 and not torch.equal(out(frozen, *call()), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_moved_weights_are_recorded_anew_and_replaced_ones_after_a_refresh(model, records):
    frozen, before = freeze(model), out(model, *call())
    out(frozen, *call())
    linear = model.final_layer.linear
    linear.weight.data = linear.weight.data * 2
    close(out(frozen, *call()), out(model, *call()))
    assert len(records) == 2
    linear.weight = torch.nn.Parameter(linear.weight.data / 2)
    assert not torch.allclose(out(frozen, *call()), before)
    frozen.refresh()
    close(out(frozen, *call()), before)
    model.blocks[0].mlp.act = torch.nn.SiLU()
    with pytest.raises(RuntimeError, match="other modules, shapes or dtypes"):
        frozen.refresh()


def test_one_record_per_shape_argument_and_backend_and_no_more_than_four(model, records):
    frozen = freeze(model)
    for batch in (1, 2, 1, 2, 3):
        close(out(frozen, *call(batch)), out(model, *call(batch)))
    assert len(records) == 3
    x, t, y = call()
    out(frozen, x, t=t, y=y)  # another call, if the same to the model
    out(frozen, x, t.float(), y)
    with difuse.use_backend("reference"):
        out(frozen, x, t, y)
    assert len(records) == 6 and len(frozen._calls) == 4
    kept = weakref.ref(next(iter(frozen._calls.values())))
    out(frozen, *call(5))
    gc.collect()
    assert kept() is None


def test_results_are_not_overwritten_and_inputs_left_alone(model, records):
    frozen, inputs = freeze(model), call()
    before = [each.clone() for each in inputs]
    first = out(frozen, *inputs)
    kept = first.clone()
    out(frozen, *call(seed=1))
    assert torch.equal(first, kept) and all(map(torch.equal, inputs, before))
    memory = frozen.memory()
    assert memory["inputs"] == sum(each.nbytes for each in inputs) and memory["results"] == first.nbytes
    assert memory["shared"] == sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


def test_sampling_autocast_and_inference_mode(model, records):
    options = dict(process=VP("linear"), prediction="v", steps=4, guidance=2.0)
    frozen, expected = freeze(model), difuse.sample(model, [0, 2], **options)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
        close(difuse.sample(frozen, [0, 2], **options), expected)
    close(difuse.sample(frozen, [0, 2], **options), expected)
    assert len(records) == 1 and not frozen(*call()).requires_grad


def test_threads(model, records):
    frozen = freeze(model)
    calls = [call(seed=seed) for seed in range(40)]
    expected = [out(model, *each) for each in calls]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(lambda each: out(frozen, *each), calls), expected, strict=True):
            close(found, right)


def test_attributes_and_switches_end_what_is_recorded(model, records):
    frozen = freeze(model)
    out(frozen, *call())
    frozen.num_classes = 2
    assert not frozen._calls and model.num_classes == 3
    out(frozen, *call())
    frozen.clear()
    assert not frozen._calls and len(records) == 2


@pytest.mark.parametrize("whose", ["ours", "torch's"])
def test_within_another_recording_it_is_the_model(model, records, monkeypatch, whose):
    """As in difuse.sample(frozen, ..., graphs=difuse.Graphs()): a second turn would never come."""
    frozen = freeze(model)
    if whose == "ours":
        with graphs._turn():
            found = out(frozen, *call())
    else:
        monkeypatch.setattr("difuse.inference.recorded.must_not_wait", lambda tensor: True)
        found = out(frozen, *call())
    assert torch.equal(found, out(model, *call())) and not graphs.recording()
    assert not records and not frozen._calls


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_in_graphs_of_sample(model):
    options = dict(process=VP("linear"), prediction="v", steps=4, guidance=2.0)
    found = difuse.sample(freeze(model), [0, 2], graphs=difuse.Graphs(), **options)
    torch.testing.assert_close(found, difuse.sample(model, [0, 2], **options), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_models_recorded_in_threads_at_once(model):
    models = [tiny_model(seed).eval().to(DEVICE) for seed in range(4)]
    expected = [out(each, *call()) for each in models]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: out(freeze(each), *call()), models))
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)
    assert torch.cuda.get_sync_debug_mode() == 0


def test_a_time_without_dimensions_may_lie_on_the_cpu(records):
    model, inputs = load("pixart").build().eval().to(DEVICE), load("pixart").inputs(torch.float32)
    inputs = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    rows = len(inputs["hidden_states"])
    expected = out(model, **inputs | {"timestep": torch.full((rows,), 500, device=DEVICE)})

    class Expands(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, timestep, **others):
            return self.model(timestep=timestep.expand(rows), **others)

    frozen = freeze(Expands().eval())
    close(tensors(out(frozen, **inputs | {"timestep": torch.tensor(500)}))[0], tensors(expected)[0])


def test_an_input_elsewhere(model, records):
    x, t, y = call()
    with pytest.raises(ValueError, match=r"an input of shape \(3,\) is on meta; expected"):
        freeze(model)(x, t.to("meta"), y)
    assert not records


def test_what_the_model_raises_is_raised_and_nothing_is_kept(model, records):
    frozen = freeze(model)
    x, t, y = call()
    with pytest.raises(ValueError, match="y has shape"):
        frozen(x, t, y[:2])
    assert not frozen._calls
    close(out(frozen, x, t, y), out(model, x, t, y))


@pytest.mark.parametrize(("what", "kind", "message"), [
    (lambda frozen: frozen.train(), RuntimeError, "cannot be trained"),
    (lambda frozen: frozen.half(), RuntimeError, "stays torch.float32"),
    (lambda frozen: frozen.requires_grad_(), RuntimeError, "has no gradients"),
    (lambda frozen: frozen.load_state_dict(tiny_model(1).state_dict()), RuntimeError, "loads no weights"),
    (pickle.dumps, TypeError, "copy or pickle the model it was made from")])
def test_what_it_cannot_do(model, what, kind, message):
    frozen = freeze(model)
    with pytest.raises(kind, match=message):
        what(frozen)


def test_values_are_not_read_while_a_graph_is_recorded_or_soon_will_be(monkeypatch):
    """A stand-in for a tensor on a GPU."""
    there, state = SimpleNamespace(is_cuda=True), {"capturing": False, "mode": 0}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: state["mode"])
    assert not must_not_wait(there) and not must_not_wait(torch.zeros(1))
    for change in ({"capturing": True}, {"mode": 2}):
        state.update({"capturing": False, "mode": 0} | change)
        assert must_not_wait(there) and not must_not_wait(torch.zeros(1))


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_precisions_are_for_cpus(model):
    with pytest.raises(ValueError, match="on a GPU, where it stays in its own dtype"):
        difuse.freeze(model, "int8")
