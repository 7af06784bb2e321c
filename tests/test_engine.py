"""Requests that share model calls give the images that each gives alone; and nothing is lost, whatever happens."""
import concurrent.futures
import dataclasses
import gc
import queue
import random
import subprocess
import sys
import threading

import pytest
import torch

import difuse
from difuse import Engine, Request
from difuse.diffusion import SAMPLERS, VP, Flow, initial_noise
from tests.tiny_training import tiny_model

SHAPE = (2, 6, 6)
WAIT = 60  # seconds; a test that waits longer has failed


class Toy(torch.nn.Module):
    """Elementwise, so that a row's bits cannot depend on its neighbours; each element depends on time and label.

    gate: calls wait for it. entered: a call has begun. bad: labels that make it fail. calls: (times, labels) of each.
    """

    num_classes = 9

    def __init__(self):
        super().__init__()
        self.config = {"in_channels": SHAPE[0], "input_size": SHAPE[1]}
        self.weight = torch.nn.Parameter(torch.tensor(0.6))
        self.gate, self.bad, self.error, self.calls = threading.Event(), (), ArithmeticError("a bad label"), []
        self.entered = threading.Event()
        self.gate.set()
        self.eval()

    def forward(self, x, t, y):
        self.entered.set()
        assert self.gate.wait(WAIT)
        self.calls.append((t.tolist(), y.tolist()))
        if set(self.bad) & set(y.tolist()):
            raise self.error
        phase = (0.7 * y + 1e-3 * t)[:, None, None, None]
        out = self.weight * x + 0.5 * torch.sin(2 * x + phase)
        return torch.cat((out, out + 100), dim=1)  # a learned sigma


class Classless(Toy):
    num_classes = None

    def forward(self, x, t):
        return super().forward(x, t, torch.zeros(len(x)))


@pytest.fixture
def toy():
    return Toy()


def alone(model, request, process, prediction="v"):
    """The request's image by its sampler, in a batch of one."""
    noise, generators = initial_noise((model.config["in_channels"], *2 * [model.config["input_size"]]), [request.seed])
    labels = None if request.label is None else torch.tensor([request.label])
    options = {"eta": request.eta} if request.sampler == "ddim" else {}
    return SAMPLERS[request.sampler](model, noise, process=process, steps=request.steps, prediction=prediction,
                                     labels=labels, guidance=request.guidance, generators=generators, **options)[0]


def results(futures):
    return [future.result(WAIT) for future in futures]


MIXED = [Request(3, 0, "ddim", 7, 1.5), Request(0, 1, "ddim", 4, 1.0), Request(8, 2, "ddpm", 9, 3.0),
         Request(9, 3, "ddim", 1, 1.0), Request(2, 4, "ddim", 12, 0.0, eta=0.7), Request(3, 5, "ddpm", 3, 1.0),
         Request(3, 0, "ddim", 7, -2.0), Request(1, 2**40, "ddim", 5, 1.5)]


@pytest.mark.parametrize("max_batch", [2, 3, 5, 64])
def test_images_are_those_of_each_request_alone(toy, max_batch):
    expected = [alone(toy, request, VP("linear")) for request in MIXED]
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=max_batch) as engine:
        images = results([engine.submit(request) for request in MIXED])
    assert all(map(torch.equal, images, expected)) and max(len(t) for t, _ in toy.calls) <= max_batch
    assert all(image.shape == SHAPE and image.dtype == torch.float32 and not image._is_view() for image in images)
    assert len(engine) == 0


def test_flow_and_a_model_without_classes():
    model = Classless()
    requests = [Request(None, seed, "flow_euler", steps, 1.0) for seed, steps in ((1, 3), (2, 5), (3, 1))]
    with Engine(model, process=Flow(), prediction="flow") as engine:
        images = results([engine.submit(request) for request in requests])
        with pytest.raises(ValueError, match="label 3 with guidance 1.5, but the model has no classes"):
            engine.submit(Request(3, 0, "flow_euler"))
    assert all(map(torch.equal, images, [alone(model, request, Flow(), "flow") for request in requests]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformers_images_differ_by_rounding(dtype):
    """Its products are a library's, which may sum other batches in another order."""
    model = tiny_model().to(dtype).eval()
    requests = [dataclasses.replace(request, label=request.label % 3) for request in MIXED]
    with Engine(model, process=VP("linear"), prediction="v") as engine:
        images = results([engine.submit(request) for request in requests])
    for image, request in zip(images, requests, strict=True):
        expected = alone(model, request, VP("linear"))
        assert (image - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_requests_share_calls_at_different_steps(toy):
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        first = engine.submit(Request(1, 0, steps=4, guidance=1.0))
        assert toy.entered.wait(WAIT)
        others = [engine.submit(Request(2, 1, steps=3, guidance=1.0)), engine.submit(Request(3, 2, steps=2))]
        toy.gate.set()
        results([first, *others])
    assert toy.calls == [([999], [1]), ([749, 999, 999, 999], [1, 2, 3, 9]), ([499, 666, 499, 499], [1, 2, 3, 9]),
                         ([249, 333], [1, 2])]


def test_a_row_that_is_free_waits_for_the_first_in_line(toy):
    """A guided request needs two rows; those behind it do not overtake it for ever."""
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=2) as engine:
        order = []
        futures = [engine.submit(Request(1, 0, steps=3, guidance=1.0)), engine.submit(Request(2, 1, steps=1)),
                   engine.submit(Request(3, 2, steps=1, guidance=1.0))]
        for name, future in enumerate(futures):
            future.add_done_callback(lambda _, name=name: order.append(name))
        toy.gate.set()
        results(futures)
    assert order == [0, 1, 2]


def test_callbacks_see_every_step(toy):
    seen = []
    request = Request(4, 0, steps=5, callback=lambda step, x: (seen.append((step, x.clone())), x.zero_()))
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        image = engine.submit(request).result(WAIT)
    assert [step for step, _ in seen] == list(range(5)) and torch.equal(seen[-1][1], image)
    assert torch.equal(image, alone(toy, request, VP("linear")))


# cancelled

@pytest.mark.parametrize("last", [0, 3, 5])
def test_cancelled_at_any_step(toy, last):
    seen = []

    def stop(step, x):
        seen.append(step)
        if step == last:
            assert futures[0].cancel()

    request = Request(3, 7, steps=6)
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        futures = [engine.submit(dataclasses.replace(request, callback=stop)), engine.submit(request)]
        toy.gate.set()
        assert len(concurrent.futures.wait(futures, WAIT).done) == 2
    assert futures[0].cancelled() and seen == list(range(last + 1))
    assert torch.equal(futures[1].result(), alone(toy, request, VP("linear")))


def test_cancelled_while_it_waits(toy):
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=2) as engine:
        running, waiting = engine.submit(Request(1, 0, steps=2)), engine.submit(Request(2, 0, steps=2))
        assert waiting.cancel() and len(engine) == 1
        toy.gate.set()
        running.result(WAIT)
        assert concurrent.futures.wait([waiting], WAIT).done
    assert not any(2 in labels for _, labels in toy.calls)


# failures

@pytest.mark.parametrize("bad", [(2,), (2, 5), range(9)])
def test_a_failure_fails_its_request_alone(toy, bad):
    requests = [Request(label, label, "ddpm", 3, 1.0 if label % 2 else 1.5) for label in range(8)]
    expected = [alone(toy, request, VP("linear")) for request in requests]
    toy.bad = bad
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=64) as engine:
        futures = [engine.submit(request) for request in requests]
        toy.gate.set()
        for request, future, image in zip(requests, futures, expected, strict=True):
            if request.label in bad:
                assert future.exception(WAIT) is toy.error
            else:
                assert torch.equal(future.result(WAIT), image)


def test_a_step_that_is_run_again_draws_no_other_noise(toy, monkeypatch):
    from difuse.inference import engine as module
    right, failures = module.sampler_step, iter([True, False, True, True])

    def sometimes(*args, **kwargs):
        if len(args[0][0]) > 1 and next(failures, False):
            raise MemoryError("too many at once")
        return right(*args, **kwargs)

    monkeypatch.setattr(module, "sampler_step", sometimes)
    requests = [Request(label, label, "ddpm", 5, 1.5) for label in range(4)]
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        futures = [engine.submit(request) for request in requests]
        toy.gate.set()
        images = results(futures)
    assert all(map(torch.equal, images, [alone(toy, request, VP("linear")) for request in requests]))


def test_a_callback_that_raises_fails_its_request(toy):
    error = LookupError("no such folder")

    def callback(step, x):
        raise error

    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        failed, fine = engine.submit(Request(1, 0, steps=3, callback=callback)), engine.submit(Request(1, 0, steps=3))
        assert failed.exception(WAIT) is error
        assert torch.equal(fine.result(WAIT), alone(toy, Request(1, 0, steps=3), VP("linear")))


def test_a_model_that_returns_another_shape_is_named(toy):
    toy.forward = lambda x, t, y: x[..., :3]
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        error = engine.submit(Request(1, 0)).exception(WAIT)
    assert isinstance(error, ValueError) and str(error) == (
        "Engine: the model returned shape (2, 2, 6, 3); expected (2, 2, 6, 6), or twice the channels with a learned "
        "sigma")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_leaves_nobody_waiting(toy):
    toy.bad, toy.error = (1,), SystemExit(3)
    toy.gate.clear()
    engine = Engine(toy, process=VP("linear"), prediction="v", max_batch=2)
    futures = [engine.submit(Request(1, 0)), engine.submit(Request(2, 0))]
    toy.gate.set()
    assert [future.exception(WAIT) for future in futures] == [toy.error, toy.error]
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request(2, 0))
    engine.close()


# bounds and ends

def test_a_full_queue_refuses_at_once_and_a_cancelled_request_makes_room(toy):
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=2, max_waiting=2) as engine:
        running = engine.submit(Request(1, 0, steps=2))
        assert toy.entered.wait(WAIT)
        waiting = [engine.submit(Request(1, seed, steps=2)) for seed in (1, 2)]
        with pytest.raises(queue.Full, match="2 requests wait already"):
            engine.submit(Request(1, 3, steps=2))
        waiting[0].cancel()
        more = engine.submit(Request(1, 3, steps=2))
        toy.gate.set()
        results([running, waiting[1], more])


def test_close_waits_and_cancels_when_asked_to(toy):
    engine = Engine(toy, process=VP("linear"), prediction="v", max_batch=1)
    futures = [engine.submit(Request(1, seed, steps=3, guidance=1.0)) for seed in range(4)]
    engine.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(RuntimeError, match="Engine: it is closed"):
        engine.submit(Request(1, 0, guidance=1.0))
    engine.close()
    with pytest.raises(KeyboardInterrupt), Engine(toy, process=VP("linear"), prediction="v") as engine:
        future = engine.submit(Request(1, 0, steps=1000))
        raise KeyboardInterrupt
    assert future.cancelled() and not engine._thread.is_alive()


def test_close_in_a_callback_is_refused(toy):
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        future = engine.submit(Request(1, 0, steps=2, callback=lambda step, x: engine.close()))
        with pytest.raises(RuntimeError, match="close was called by a callback"):
            future.result(WAIT)


def test_the_interpreter_ends_while_requests_run():
    code = """
import difuse
from difuse.diffusion import VP
from tests.tiny_training import tiny_model
engine = difuse.Engine(tiny_model().eval(), process=VP("linear"), prediction="v")
future = engine.submit(difuse.Request(1, 0, steps=1000))
print("left")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"label": 10}, ValueError, "label is 10; expected 0 to 8, or 9 for the null class"),
    ({"label": -1}, ValueError, "label is -1"),
    ({"label": None}, TypeError, "label is None; expected an integer"),
    ({"label": True}, TypeError, "label is True; expected an integer"),
    ({"seed": 1.5}, TypeError, "seed is 1.5; expected an integer"),
    ({"sampler": "dddim"}, ValueError, "sampler 'dddim' is unknown; did you mean 'ddim'"),
    ({"sampler": "flow_euler"}, ValueError, "flow_euler: process is VP; expected Flow"),
    ({"steps": 0}, ValueError, "steps is 0; expected an integer from 1 to 1000"),
    ({"steps": 1001}, ValueError, "steps is 1001"),
    ({"guidance": float("nan")}, ValueError, "guidance is nan; expected a finite number"),
    ({"eta": 2.0}, ValueError, "eta is 2.0; expected 0"),
    ({"sampler": "ddpm", "eta": 0.5}, ValueError, "eta is 0.5 with ddpm; only ddim takes one"),
])
def test_requests_that_cannot_run_are_refused_at_once(toy, change, error, message):
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        with pytest.raises(error, match=message):
            engine.submit(dataclasses.replace(Request(1, 0), **change))
        assert len(engine) == 0
    assert not toy.calls


def test_what_is_no_engine_or_request(toy):
    with pytest.raises(ValueError, match="max_batch is 0; expected an integer >= 1"):
        Engine(toy, process=VP("linear"), prediction="v", max_batch=0)
    with pytest.raises(ValueError, match="max_waiting is None"):
        Engine(toy, process=VP("linear"), prediction="v", max_waiting=None)
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=1) as engine:
        with pytest.raises(ValueError, match="guidance needs two rows; expected max_batch >= 2"):
            engine.submit(Request(1, 0))
        with pytest.raises(TypeError, match="the request is dict; expected a difuse.Request"):
            engine.submit({"label": 1})
    with pytest.raises(ValueError, match="train mode"):
        Engine(toy.train(), process=VP("linear"), prediction="v")


def test_soak(toy):
    """Two thousand requests, some cancelled at some moment, some failing: each ends as it should, nothing stays."""
    rng = random.Random(0)
    toy.bad = (5,)
    kinds = [Request(label, seed, sampler, steps, guidance)
             for label in (1, 2, 5) for seed in (0, 1) for sampler, steps in (("ddim", 1), ("ddpm", 3), ("ddim", 4))
             for guidance in (1.0, 1.5)]
    reference = Toy()
    expected = {request: alone(reference, request, VP("linear")) for request in kinds}
    counts, tensors = dict.fromkeys(("image", "failed", "cancelled"), 0), []

    def tensors_alive():
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    with Engine(toy, process=VP("linear"), prediction="v", max_batch=12, max_waiting=40) as engine:
        for _ in range(20):
            toy.calls.clear()
            futures = []
            while len(futures) < 100:
                request = rng.choice(kinds)
                try:
                    futures.append((request, engine.submit(request)))
                except queue.Full:
                    rng.choice(futures)[1].exception(WAIT) if rng.random() < 0.01 else None
                    continue
                if rng.random() < 0.2:
                    rng.choice(futures)[1].cancel()
            for request, future in futures:
                assert future in concurrent.futures.wait([future], WAIT).done
                if future.cancelled():
                    counts["cancelled"] += 1
                elif request.label == 5:
                    assert future.exception() is toy.error
                    counts["failed"] += 1
                else:
                    assert torch.equal(future.result(), expected[request])
                    counts["image"] += 1
            del futures, future
            toy.error.__traceback__ = None  # it holds the frames that it was raised through
            tensors.append(tensors_alive())
        assert len(engine) == 0
    assert sum(counts.values()) == 2000 and min(counts.values()) > 100
    assert max(tensors[2:]) <= tensors[1] + 5
    assert difuse.Engine is Engine
