"""Recorded sampling steps: images as without them, one record per shape, a bound, nothing stale, nothing that waits.

Without a GPU `record` is replaced by a stand-in that runs the function again: buffers, keys and refusals are the same.
"""
import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import difuse
from difuse.diffusion import (
    APG,
    SAMPLERS,
    VESDE,
    VP,
    Flow,
    Guidance,
    Previews,
    Threshold,
    ddim,
    initial_noise,
    skip_layers,
)
from difuse.inference import graphs as graphs_module
from difuse.inference.sample import _Done
from difuse.models import DiT
from tests.mixture import smooth

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SIZES = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DiT(**SIZES).to(DEVICE)
    for parameter in model.parameters():  # a fresh DiT returns zeros
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images(model, graphs, labels=(0, 3, 4), **changes):
    settings = dict(process=VP("linear"), prediction="eps", sampler="ddim", steps=5, guidance=2.0, seeds=[3, 1, 2])
    return difuse.sample(model, list(labels), graphs=graphs, **{**settings, **changes})


@pytest.mark.parametrize("changes", [
    dict(), dict(guidance=1.0), dict(sampler="ddpm"), dict(sampler="euler"),
    dict(sampler="flow_euler", process=Flow(), prediction="flow"),
    dict(steps=1), dict(batch_size=2)], ids=lambda changes: "-".join(changes) or "ddim")
def test_images_are_those_without_graphs(changes, model, records):
    graphs, plain = difuse.Graphs(), images(model, None, **changes)
    for _ in range(2):  # recorded, then replayed
        torch.testing.assert_close(images(model, graphs, **changes), plain, rtol=0, atol=0)
    assert len(records) == len(graphs) == (1 + ("batch_size" in changes or changes.get("sampler") == "ddpm"))


@pytest.mark.parametrize("name", ["unipc", "dpm_solver_pp_3m", "heun", "deis", "dpm_solver_pp_2m_sde", "pndm"])
def test_histories_are_replayed_too(name, model, records):
    """Steps that keep tensors: as many records as kinds of steps, none of them anew in a second run."""
    graphs, plain = difuse.Graphs(keep=8), images(model, None, sampler=name, steps=9)
    for _ in range(2):
        torch.testing.assert_close(images(model, graphs, sampler=name, steps=9), plain, rtol=0, atol=0)
    assert len(records) == len(graphs) <= 6
    before = len(records)
    changed = dict(sampler=name, steps=9, seeds=[5, 6, 7], guidance=1.2)
    assert torch.equal(images(model, graphs, **changed), images(model, None, **changed)) and len(records) == before


MASK = (torch.arange(8) < 4).float().expand(3, 3, 8, 8)


@pytest.mark.parametrize("changes, most", [
    (dict(guidance=Guidance(2.0, rescale=0.5)), 1),
    (dict(guidance=Guidance(2.0, zero_star=True, zero_steps=2)), 2),
    (dict(guidance=Guidance(2.0, per_token=2)), 1),
    (dict(guidance=Guidance(2.0, apg=APG(0.1, 5.0, -0.5)), sampler="dpm_solver_pp_2m"), 4),
    (dict(clip=1.0), 2),
    (dict(clip=Threshold(0.9, 2.0), sampler="unipc"), 5),
    (dict(image=MASK / 2, mask=MASK), 3),
], ids=["rescale", "zero_star", "per_token", "apg", "clip", "threshold", "mask"])
def test_what_is_not_linear_is_recorded_too(changes, most, model, records):
    graphs, plain = difuse.Graphs(keep=8), images(model, None, steps=8, **changes)
    for _ in range(2):
        torch.testing.assert_close(images(model, graphs, steps=8, **changes), plain, rtol=0, atol=0)
    assert len(records) == len(graphs) <= most


def test_a_rule_s_own_numbers_are_another_graph(model, records):
    graphs = difuse.Graphs(keep=8)
    settings = [dict(guidance=Guidance(2.0, rescale=phi), clip=clip) for phi in (0.5, 0.9) for clip in (1.0, 0.4)]
    for changes in 2 * settings:
        assert torch.equal(images(model, graphs, **changes), images(model, None, **changes)), changes


def test_langevin_steps_and_a_learned_variance_are_recorded(records):
    def model(x, t, labels):
        return torch.cat((smooth(x, t), smooth(x, t).sin()), 1)

    noise, labels = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    for name, process, options, most in (("ddpm", VP(), {"variance": "learned"}, 3),
                                         ("predictor_corrector", VESDE(), {}, 3)):
        results, graphs = [], difuse.Graphs(keep=8)
        for recorded in (None, graphs):
            generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
            results.append(SAMPLERS[name](model, noise, process=process, steps=6, prediction="eps", labels=labels,
                                          generators=generators, graphs=recorded, **options))
        assert torch.equal(*results) and len(graphs) <= most


def test_a_classifier_is_not_recorded(model, records):
    guidance = Guidance(classifier=lambda x, t, labels: x.flatten(1).sum(1))
    with pytest.raises(ValueError, match="ddim: a classifier's gradient .*expected graphs=None"):
        images(model, difuse.Graphs(), guidance=guidance)


def test_other_models_are_recorded_and_known_by_their_weights(model, records):
    weak = copy.deepcopy(model)
    for parameter in weak.parameters():
        parameter.data.mul_(0.9)
    graphs = difuse.Graphs(keep=8)
    for guidance in (Guidance(2.0, weak=weak), Guidance(1.5, skip=skip_layers(model, [1]), skip_scale=0.7)):
        before = len(records)
        for _ in range(2):
            assert torch.equal(images(model, graphs, guidance=guidance), images(model, None, guidance=guidance))
        assert len(records) == before + 1
    guidance = Guidance(2.0, weak=weak)
    images(model, graphs, guidance=guidance)
    before = len(records)
    first = next(weak.parameters())
    first.data = first.data * 1.1  # elsewhere in memory: recorded anew
    assert torch.equal(images(model, graphs, guidance=guidance), images(model, None, guidance=guidance))
    assert len(records) == before + 1


def test_models_in_other_roles_are_another_graph(model, records):
    weak, other = copy.deepcopy(model), copy.deepcopy(model)
    for k, each in enumerate((weak, other)):
        for parameter in each.parameters():
            parameter.data.mul_(0.9 - 0.2 * k)
    graphs = difuse.Graphs(keep=8)
    for guidance in (Guidance(2.0, weak=weak, skip=other, skip_scale=0.5),
                     Guidance(2.0, weak=other, skip=weak, skip_scale=0.5),
                     Guidance(1.5, skip=skip_layers(other, [0]), skip_scale=0.5),
                     Guidance(1.5, skip=skip_layers(other, [1]), skip_scale=0.5)):
        assert torch.equal(images(model, graphs, guidance=guidance), images(model, None, guidance=guidance))
    before = len(records)
    assert torch.equal(images(model, graphs, guidance=Guidance(1.5, skip=skip_layers(other, [1]), skip_scale=0.5)),
                       images(model, None, guidance=guidance)) and len(records) == before  # the same, made anew
    for parameter in other.parameters():
        parameter.data = parameter.data * 1.1  # elsewhere in memory
    assert torch.equal(images(model, graphs, guidance=guidance), images(model, None, guidance=guidance))
    assert len(records) == before + 1


@pytest.mark.parametrize("name", ["unipc", "dpm_solver_pp_3m", "deis", "pndm"])
def test_a_second_call_records_nothing(name, model, records):
    """However many kinds of steps one has."""
    graphs = difuse.Graphs()
    images(model, graphs, sampler=name, steps=9)
    before = len(records)
    images(model, graphs, sampler=name, steps=9)
    assert len(records) == before == len(graphs)


def test_callbacks_see_previews_and_replace_and_stop(model, records):
    """As without graphs: the same states, the same x0, the same end."""
    for name in ("ddim", "unipc", "heun"):
        seen = []
        for graphs in (None, difuse.Graphs(keep=8)):
            seen.append([])

            def callback(step, x, x0, found=seen[-1]):
                found += [x, x0]
                return False if step == 3 else x + 0.5 if step == 1 else None

            seen[-1].append(images(model, graphs, sampler=name, steps=6, callback=Previews(callback)))
        assert len(seen[0]) == len(seen[1]) == 9 and all(map(torch.equal, *seen)), name
    with pytest.raises(ValueError, match=r"the callback returned torch.float32 \(1,\) as the state"):
        images(model, difuse.Graphs(), callback=lambda step, x: x.new_zeros(1))


def test_replayed_with_other_coefficients_labels_and_seeds(model, records):
    graphs = difuse.Graphs()
    images(model, graphs)
    for changes in (dict(steps=9), dict(guidance=3.5), dict(labels=(1, 1, 2)), dict(seeds=[7, 8, 9]),
                    dict(process=VP("cosine")), dict(prediction="v")):
        assert torch.equal(images(model, graphs, **changes), images(model, None, **changes)), changes
    assert len(records) == 1


def test_weights_trained_in_place_are_seen_and_moved_ones_recorded_anew(model, records):
    graphs, before = difuse.Graphs(), images(model, None)
    images(model, graphs)
    weight = model.final_layer.linear.weight
    with torch.no_grad():
        weight.mul_(2)
    assert len(records) == 1 and torch.equal(images(model, graphs), images(model, None))
    old = weight.data
    try:
        weight.data = weight.data / 2
        assert torch.equal(images(model, graphs), before)
        assert len(records) == 2
    finally:
        weight.data = old
        with torch.no_grad():
            weight.div_(2)


def test_surroundings_are_recorded_apart(model, records):
    graphs = difuse.Graphs()
    images(model, graphs)
    with difuse.use_backend("reference"):
        inside = images(model, graphs)
        assert len(records) == 2 and torch.equal(inside, images(model, None))
    with torch.autocast("cuda", torch.bfloat16) if HAS_GPU else torch.autocast("cpu", torch.bfloat16):
        if HAS_GPU:
            assert torch.equal(images(model, graphs), images(model, None))
            assert len(records) == 3


def test_the_bound_drops_what_was_used_longest_ago_and_frees_it(model, records):
    graphs = difuse.Graphs(keep=2)
    for count in (1, 2, 1, 3, 1):  # samples; recorded: 1, 2, 3, which drops 2
        images(model, graphs, labels=[0] * count, seeds=range(count))
        assert len(graphs) <= 2
    assert len(records) == 3
    images(model, graphs, labels=[0, 0], seeds=[0, 1])
    assert len(records) == 4
    kept = weakref.ref(next(iter(graphs._captured.values())))
    graphs.clear()
    gc.collect()
    assert len(graphs) == 0 and kept() is None


def test_what_was_handed_out_is_not_overwritten(model, records):
    graphs, states = difuse.Graphs(), []
    first = images(model, graphs, callback=lambda step, x: states.append(x))
    copies = [state.clone() for state in states]
    second = images(model, graphs, seeds=[10, 11, 12])
    assert len({state.data_ptr() for state in states}) == len(states) == 5
    assert all(map(torch.equal, states, copies)) and torch.equal(first, states[-1]) and not torch.equal(first, second)


def test_noise_is_left_as_it_was(model, records):
    noise, _ = initial_noise((3, 8, 8), [0, 1], DEVICE)
    before = noise.clone()
    ddim(model, noise, process=VP("linear"), steps=3, prediction="eps", labels=torch.tensor([0, 1], device=DEVICE),
         graphs=difuse.Graphs())
    assert torch.equal(noise, before)


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_waits_inside_the_loop(records):
    """After the coefficients are made, no value is read back; the model here reads none either."""
    def model(x, t, y):
        return x * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1)

    model.num_classes = 4
    noise, generators = initial_noise((1, 4, 4), [0, 1], DEVICE)
    labels, graphs, steps = torch.tensor([0, 1], device=DEVICE), difuse.Graphs(), []
    with Waits() as waits:
        def began(step, x):
            if step == 0:
                waits.seen.clear()
            steps.append(step)

        rules = dict(rescale=0.5), dict(zero_star=True), dict(per_token=2), dict(apg=APG(0.5, 1.0, -0.5))
        for guidance in (2.0, *(Guidance(2.0, **rule) for rule in rules)):
            for with_graphs in (None, graphs):
                ddim(model, noise, process=VP("linear"), steps=4, prediction="eps", labels=labels, guidance=guidance,
                     eta=0.5, generators=generators, clip=1.0, callback=began, graphs=with_graphs)
                assert not waits.seen
        (labels[0] == 0).item()
        assert waits.seen  # the counter counts
    assert steps == [0, 1, 2, 3] * 10


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_nothing_waits_on_a_gpu(model):
    graphs = difuse.Graphs()
    images(model, graphs)
    noise, generators = initial_noise((3, 8, 8), [0, 1, 2], DEVICE)
    labels = torch.tensor([0, 3, 4], device=DEVICE)
    waiting = []

    def mode(step, _x):
        torch.cuda.set_sync_debug_mode("error" if step < 4 else "default")
        waiting.append(step)

    try:
        ddim(model, noise, process=VP("linear"), steps=5, prediction="eps", labels=labels, guidance=2.0, eta=1.0,
             generators=generators, callback=mode, graphs=graphs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waiting == [0, 1, 2, 3, 4]


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here")
def test_without_a_gpu_graphs_are_refused(model):
    with pytest.raises(ValueError, match="the state is on cpu; CUDA graphs need a GPU"):
        images(model, difuse.Graphs())


@pytest.mark.parametrize("keep", [0, -1, 1.5, None])
def test_a_bound_that_is_none_is_refused(keep):
    with pytest.raises(ValueError, match="keep is .*; expected an integer >= 1"):
        difuse.Graphs(keep)


def test_a_recorded_step_takes_its_own_shapes_only(records):
    x, t = torch.zeros(2, 3, device=DEVICE), torch.ones((), device=DEVICE)
    captured = graphs_module.Captured(lambda x, t, z: (x + t, x), (x, t, None))  # the state and the one before
    for _ in range(2):
        state, before = captured(x, t, None)
        assert torch.equal(state, x + 1) and torch.equal(before, x) and torch.equal(x, torch.zeros_like(x))
    state, before = captured(state, t, None)  # its own buffer, as a state is
    assert torch.equal(state, x + 2) and torch.equal(before, x + 1)
    for bad, words in (((x[:1], t, None), r"input 0 is \(1, 3\) .*recorded for \(2, 3\)"),
                       ((x.double(), t, None), "torch.float64"), ((x, None, None), "input 1 is None"),
                       ((x, t, t), "input 2 is .*recorded for None")):
        with pytest.raises(ValueError, match=words):
            captured(*bad)


def test_buffers_recorded_in_inference_mode_serve_outside_of_it(model, records):
    graphs = difuse.Graphs()
    with torch.inference_mode():
        images(model, graphs)
    assert torch.equal(images(model, graphs), images(model, None)) and len(records) == 1


def test_a_step_that_waits_for_the_device_says_what_to_do(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        assert modes[-1] == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="called a synchronizing.*must not read values back.*use it without graphs"):
        graphs_module._run_without_waiting(step)
    assert modes[-1] == "default"
    with pytest.raises(torch.OutOfMemoryError):
        graphs_module._run_without_waiting(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))


def test_what_the_model_raises_is_raised_and_nothing_is_kept(model, monkeypatch):
    def record(function, device):
        function()

    monkeypatch.setattr(graphs_module, "record", record)
    graphs = difuse.Graphs()
    monkeypatch.setattr(type(model), "forward", lambda *_: (_ for _ in ()).throw(KeyError("the model's own")))
    with pytest.raises(KeyError, match="the model's own"):
        images(model, graphs)
    assert len(graphs) == 0


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_after_a_model_that_waits_the_process_is_as_before(model):
    def waits(x, t, y):
        return x * float(x.sum())

    noise, _ = initial_noise((1, 4, 4), [0, 1], DEVICE)
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="must not read values back"):
        ddim(waits, noise, process=VP("linear"), steps=2, prediction="eps", labels=torch.zeros(2, dtype=torch.int64),
             graphs=difuse.Graphs())
    assert torch.cuda.current_stream() == before and torch.cuda.get_sync_debug_mode() == 0
    assert torch.equal(images(model, difuse.Graphs()), images(model, None))


class Event:
    """A device's mark in its stream, done when it is told to be."""

    def __init__(self):
        self.done = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


def test_the_bar_shows_what_a_gpu_has_done_and_waits_for_it_at_the_end_only(monkeypatch):
    events, shown = [], []

    def record_event():
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=record_event))
    done = _Done(SimpleNamespace(update=lambda: shown.append(sum(event.done for event in events))))
    x = SimpleNamespace(is_cuda=True, device="cuda:0")
    done.count(x)
    done.count(x)
    assert not shown  # the host is two steps ahead
    events[0].done = True
    done.count(x)
    assert shown == [1]
    done.wait()
    assert shown == [1, 2, 3]
