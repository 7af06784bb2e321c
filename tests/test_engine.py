"""Requests that share model calls give the images that each gives alone; and nothing is lost, whatever happens."""
import concurrent.futures
import dataclasses
import gc
import os
import queue
import random
import subprocess
import sys
import threading
import time
import traceback
import weakref

import pytest
import torch

from difuse import Engine, Request, use_backend
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
        phase = (0.7 * y.float() + 1e-3 * t.float())[:, None, None, None]
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
    toy.calls.clear()
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=max_batch) as engine:
        futures = [engine.submit(request) for request in MIXED]
        assert engine.pending == len(MIXED) and toy.entered.wait(WAIT)
        toy.gate.set()
        images = results(futures)
    assert all(map(torch.equal, images, expected)) and max(len(t) for t, _ in toy.calls) <= max_batch
    assert all(image.shape == SHAPE and image.dtype == torch.float32 and not image._is_view() for image in images)
    assert engine.pending == 0
    if max_batch == 64:  # all but those that the first call may have been too early for
        assert len(toy.calls) <= 13 and max(len(set(t)) for t, _ in toy.calls) >= 5


def test_an_infinite_output_fails_its_request_and_harms_nobody(toy):
    def infinite(x, t, y):
        return torch.where((y == 5)[:, None, None, None], torch.tensor(float("inf")), Toy.forward(toy, x, t, y)[:, :2])

    toy.forward = infinite
    requests = [Request(5, 0, steps=1, guidance=1.0), Request(1, 1, "ddpm", steps=2), Request(2, 2, steps=2)]
    expected = [alone(toy, request, VP("linear")) for request in requests[1:]]
    with pytest.raises(FloatingPointError, match="ddim: the model returned 72 numbers that are not finite at step 0"):
        alone(toy, requests[0], VP("linear"))
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        futures = [engine.submit(request) for request in requests]
        toy.gate.set()
        assert all(map(torch.equal, results(futures[1:]), expected))
        with pytest.raises(FloatingPointError, match="Engine, ddim: the model returned 72 numbers that are not finite"):
            futures[0].result(WAIT)


def test_the_default_dtype_does_not_change_an_image(toy):
    request = Request(2, 4, "ddpm", 3)
    expected = alone(toy, request, VP("linear"))
    torch.set_default_dtype(torch.float64)
    try:
        with Engine(toy, process=VP("linear"), prediction="v") as engine:
            assert torch.equal(engine.submit(request).result(WAIT), expected)
    finally:
        torch.set_default_dtype(torch.float32)


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
    """Its products are a library's, which may sum other batches in another order; beside float64 neither is better."""
    model = tiny_model().to(dtype).eval()
    requests = [dataclasses.replace(request, label=request.label % 3) for request in MIXED]
    with Engine(model, process=VP("linear"), prediction="v") as engine:
        images = torch.stack(results([engine.submit(request) for request in requests]))
    single = torch.stack([alone(model, request, VP("linear")) for request in requests])
    with use_backend("reference"):
        truth = torch.stack([alone(model.double(), request, VP("linear")) for request in requests])
    off, least = ((found - truth).square().mean().sqrt() for found in (images, single))
    assert off <= 1.5 * least + torch.finfo(dtype).eps * truth.square().mean().sqrt()


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
        assert waiting.cancel() and engine.pending == 1
        toy.gate.set()
        running.result(WAIT)
        assert concurrent.futures.wait([waiting], WAIT).done
    assert not any(2 in labels for _, labels in toy.calls)


def test_a_cancelled_request_is_in_nobodys_way(toy):
    """One row is taken for long, the next in line needs two and is cancelled: the one behind it fits in."""
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=2) as engine:
        long = engine.submit(Request(1, 0, steps=1000, guidance=1.0))
        assert toy.entered.wait(WAIT)
        wide, behind = engine.submit(Request(2, 0, steps=2)), engine.submit(Request(3, 0, steps=2, guidance=1.0))
        wide.cancel()
        toy.gate.set()
        behind.result(WAIT)
        assert not long.done() and concurrent.futures.wait([wide], WAIT).done
        long.cancel()


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
    failures = iter([True, False, True, True])

    def sometimes(x, t, y):
        if len(set(y.tolist()) - {9}) > 1 and next(failures, False):
            raise MemoryError("too many at once")
        return Toy.forward(toy, x, t, y)

    monkeypatch.setattr(toy, "forward", sometimes)
    requests = [Request(label, label, "ddpm", 5, 1.5) for label in range(4)]
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        futures = [engine.submit(request) for request in requests]
        toy.gate.set()
        images = results(futures)
    assert all(map(torch.equal, images, [alone(toy, request, VP("linear")) for request in requests]))


def test_one_error_raised_many_times_carries_one_traceback(toy):
    toy.bad = range(9)
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=64) as engine:
        futures = [engine.submit(Request(1, seed)) for seed in range(32)]
        assert all(future.exception(WAIT) is toy.error for future in futures)
    note, = toy.error.__notes__
    assert note.startswith("Raised in difuse.Engine:\nTraceback") and "raise self.error" in note and len(note) < 5000


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


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_an_exit_inside_the_model_or_a_callback_ends_that_request_alone(toy, error):
    def leave(step, x):
        raise error

    toy.bad, toy.error = (1,), error
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        futures = [engine.submit(Request(1, 0)), engine.submit(Request(2, 0, steps=2, callback=leave)),
                   engine.submit(Request(2, 0, steps=2))]
        toy.gate.set()
        assert [future.exception(WAIT) for future in futures] == [error, error, None]


@pytest.mark.parametrize("where", ["noise", "clone"])
def test_no_memory_for_a_request_fails_it_alone(toy, monkeypatch, where):
    from difuse.inference import requests as module
    right, bad = module.initial_noise, []

    def initial_noise(shape, seeds, device):
        if where == "noise" and seeds == [66]:
            raise MemoryError("no room")
        return right(shape, seeds, device)

    monkeypatch.setattr(module, "initial_noise", initial_noise)
    if where == "clone":
        call = Engine._call

        def spoiled(self, running):
            bad.append(len(running))
            if any(each.request.seed == 66 for each in running):
                raise MemoryError("no room")
            return call(self, running)

        monkeypatch.setattr(Engine, "_call", spoiled)
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        futures = [engine.submit(Request(1, seed, steps=2)) for seed in (1, 66, 2)]
        toy.gate.set()
        assert isinstance(futures[1].exception(WAIT), MemoryError)
        assert all(torch.equal(futures[i].result(WAIT), alone(toy, Request(1, seed, steps=2), VP("linear")))
                   for i, seed in ((0, 1), (2, 2)))


class Activations(Toy):
    """Fails with a number of rows beyond what fits, those of failed calls that something still holds included."""

    def __init__(self):
        super().__init__()
        self.alive, self.budget = [], 6

    def forward(self, x, t, y):
        activations = torch.zeros(len(x), 3)
        self.alive.append(weakref.ref(activations))
        if sum(len(held()) for held in self.alive if held() is not None) > self.budget:
            raise MemoryError("too many rows")
        return super().forward(x, t, y)


def test_halves_are_run_again_in_the_memory_of_the_failed_whole():
    model = Activations()
    requests = [Request(label, label, steps=2, guidance=1.0) for label in range(8)]
    model.gate.clear()
    gc.disable()
    try:
        with Engine(model, process=VP("linear"), prediction="v") as engine:
            first = engine.submit(requests[0])
            assert model.entered.wait(WAIT)
            futures = [first, *map(engine.submit, requests[1:])]
            model.gate.set()
            images = results(futures)
    finally:
        gc.enable()
    assert all(map(torch.equal, images, [alone(model, request, VP("linear")) for request in requests]))
    assert max(len(times) for times, _ in model.calls) <= 6


def test_a_kept_failure_holds_nothing_but_itself(toy):
    """Neither its batch mates' images, nor what the model had computed; and no cycle delays a dropped one's end."""
    class Odd(Exception):
        pass

    def fail(x, t, y):
        held.append(weakref.ref(local := x * 2))
        if 1 in y:
            try:
                raise KeyError("inner")
            except KeyError:
                raise Odd(f"outer {local.shape}")  # noqa: B904  the context is what this is about
        return Toy.forward(toy, x, t, y)

    held, toy.forward = [], fail
    toy.gate.clear()
    gc.collect()
    gc.disable()
    try:
        with Engine(toy, process=VP("linear"), prediction="v") as engine:
            failed, fine = engine.submit(Request(1, 0, steps=2)), engine.submit(Request(2, 0, steps=2))
            toy.gate.set()
            error, image = failed.exception(WAIT), weakref.ref(fine.result(WAIT))
        lines = "".join(traceback.format_exception(error))
        assert "KeyError: 'inner'" in lines and "in fail" in lines and "raise Odd" in lines
        del fine, engine
        assert image() is None and not any(each() is not None for each in held)
        gone = weakref.ref(failed)
        del failed, error
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_leaves_nobody_waiting(toy):
    """A done-callback of a future that exits is the one thing that ends the thread."""
    def leave(future):
        raise SystemExit(3)

    toy.gate.clear()
    engine = Engine(toy, process=VP("linear"), prediction="v", max_batch=2)
    futures = [engine.submit(Request(1, 0, steps=2)) for _ in range(3)]
    futures[0].add_done_callback(leave)
    toy.gate.set()
    assert futures[0].result(WAIT).shape == SHAPE
    for future in futures[1:]:
        error = future.exception(WAIT)
        assert "its thread ended" in str(error) and isinstance(error.__cause__, SystemExit)
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


def test_what_fits_in_at_once_does_not_wait(toy):
    """An idle engine takes a burst of as many requests as it has rows, and max_waiting more."""
    toy.gate.clear()
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=4, max_waiting=1) as engine:
        futures = [engine.submit(Request(1, seed, steps=2, guidance=1.0)) for seed in range(5)]
        with pytest.raises(queue.Full):
            engine.submit(Request(1, 5, steps=2, guidance=1.0))
        toy.gate.set()
        results(futures)


def test_done_callbacks_may_call_the_engine(toy):
    """They run in the thread that cancels, or on the engine's: neither holds a lock then."""
    toy.gate.clear()
    engine, answers = Engine(toy, process=VP("linear"), prediction="v", max_batch=2), []

    def other_thread(future):
        helper = threading.Thread(target=lambda: answers.append(engine.pending))
        helper.start()
        helper.join(WAIT)

    futures = [engine.submit(Request(1, seed, steps=2)) for seed in range(3)]
    for future in futures:
        future.add_done_callback(other_thread)
    futures[1].add_done_callback(lambda future: engine.close(cancel=True))
    threading.Timer(0.2, toy.gate.set).start()
    engine.close(cancel=True)
    assert len(answers) == 3 and all(future.cancelled() for future in futures) and not engine._thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_told(toy):
    code = """
import os, difuse
from difuse.diffusion import VP
from tests.tiny_training import tiny_model
engine = difuse.Engine(tiny_model().eval(), process=VP("linear"), prediction="v")
engine.submit(difuse.Request(1, 0, steps=2)).result()
child = os.fork()
if not child:
    try:
        engine.submit(difuse.Request(1, 0))
    except RuntimeError as error:
        print(error, flush=True)
    engine.close()
else:
    print(os.waitpid(child, 0)[1] == 0, flush=True)
    engine.close()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=WAIT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Engine: it belongs to the process that this one was forked from; make one here\nTrue\n"


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
    blocked = """
import threading
future = engine.submit(difuse.Request(1, 0, callback=lambda step, x: threading.Event().wait()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
    done = subprocess.run([sys.executable, "-c", code + blocked], capture_output=True, text=True, timeout=WAIT)
    assert (done.returncode, done.stdout) == (0, "left\n")


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"label": 10}, ValueError, "label is 10; expected 0 to 9"),
    ({"label": -1}, ValueError, "label is -1"),
    ({"label": None}, TypeError, "label is None; expected an integer"),
    ({"label": True}, TypeError, "label is True; expected an integer"),
    ({"seed": 1.5}, TypeError, "seed is 1.5; expected an integer"),
    ({"seed": 2**64}, ValueError, "seed is 18446744073709551616; expected -9223372036854775808 to"),
    ({"sampler": ["ddim"]}, ValueError, "sampler .'ddim'. is unknown"),
    ({"steps": True}, TypeError, "steps is True; expected an integer"),
    ({"steps": 10**7}, ValueError, "steps is 10000000; expected 1 to 10000"),
    ({"guidance": "1.5"}, TypeError, "guidance is '1.5'; expected a number"),
    ({"guidance": 10**400}, ValueError, "guidance is 10+; expected a finite number"),
    ({"guidance": 1e300}, ValueError, "guidance is 1e.300; expected a finite number that float32 can hold"),
    ({"eta": None}, TypeError, "eta is None; expected a number"),
    ({"callback": "x"}, TypeError, "callback is 'x'; expected a function"),
    ({"sampler": "dddim"}, ValueError, "sampler 'dddim' is unknown; did you mean 'ddim'"),
    ({"sampler": "flow_euler"}, ValueError, "flow_euler: process is VP; expected Flow"),
    ({"steps": 0}, ValueError, "steps is 0; expected 1 to 10000"),
    ({"steps": 1001}, ValueError, "steps is 1001"),
    ({"guidance": float("nan")}, ValueError, "guidance is nan; expected a finite number"),
    ({"eta": 2.0}, ValueError, "eta is 2.0; expected 0"),
    ({"sampler": "ddpm", "eta": 0.5}, ValueError, "eta is 0.5 with ddpm; only ddim takes one"),
])
def test_requests_that_cannot_run_are_refused_at_once(toy, change, error, message):
    with Engine(toy, process=VP("linear"), prediction="v") as engine:
        with pytest.raises(error, match=message):
            engine.submit(dataclasses.replace(Request(1, 0), **change))
        assert engine.pending == 0
    assert not toy.calls


def test_what_is_no_engine_or_request(toy):
    with pytest.raises(ValueError, match="max_batch is 0; expected 1 to inf"):
        Engine(toy, process=VP("linear"), prediction="v", max_batch=0)
    with pytest.raises(TypeError, match="max_waiting is None; expected an integer"):
        Engine(toy, process=VP("linear"), prediction="v", max_waiting=None)
    with pytest.raises(TypeError, match="process is NoneType; expected one of difuse.diffusion"):
        Engine(toy, process=None, prediction="v")
    with pytest.raises(ValueError, match="prediction 'epsilon' is unknown; expected one of"):
        Engine(toy, process=Flow(), prediction="epsilon")
    with Engine(toy, process=VP("linear"), prediction="v", max_batch=1) as engine:
        with pytest.raises(ValueError, match="guidance needs two rows; expected max_batch >= 2"):
            engine.submit(Request(1, 0))
        with pytest.raises(TypeError, match="the request is dict; expected a difuse.Request"):
            engine.submit({"label": 1})
    with pytest.raises(ValueError, match="train mode"):
        Engine(toy.train(), process=VP("linear"), prediction="v")


def test_soak(toy):
    """Two thousand requests, cancelled at some moment or failing or refused: each ends as it should, nothing stays."""
    rng, refused, seconds = random.Random(0), 0, [0.0, 1e-3]
    right, expected, counts, alive = Toy.forward, {}, dict.fromkeys(("image", "failed", "cancelled"), 0), []

    def forward(x, t, y):
        time.sleep(rng.choice(seconds))
        if 5 in y:
            raise ArithmeticError(f"a bad label in {len(x)} rows")
        return right(toy, x, t, y)

    def callback(step, x):
        if step == 1:
            raise LookupError("a bad callback")

    kinds = [Request(label, seed, sampler, steps, guidance, callback=callback if label == 7 else None)
             for label in (1, 2, 5, 7) for seed in (0, 1) for sampler, steps in (("ddim", 1), ("ddpm", 3), ("ddim", 4))
             for guidance in (1.0, 1.5)]
    for request in kinds:
        expected[request] = None if request.label == 5 or (request.label == 7 and request.steps > 1) else alone(
            toy, request, VP("linear"))
    toy.forward = forward
    gc.collect()
    gc.disable()
    try:
        with Engine(toy, process=VP("linear"), prediction="v", max_batch=12, max_waiting=20) as engine:
            for _ in range(20):
                futures = []
                while len(futures) < 100:
                    request = rng.choice(kinds)
                    try:
                        futures.append((request, engine.submit(request)))
                    except queue.Full:
                        refused += 1
                        time.sleep(1e-3)
                    if rng.random() < 0.2:
                        rng.choice(futures)[1].cancel()
                assert not concurrent.futures.wait([future for _, future in futures], WAIT).not_done
                for request, future in futures:
                    if future.cancelled():
                        counts["cancelled"] += 1
                    elif expected[request] is None:
                        assert isinstance(future.exception(), ArithmeticError if request.label == 5 else LookupError)
                        counts["failed"] += 1
                    else:
                        assert torch.equal(future.result(), expected[request])
                        counts["image"] += 1
                toy.calls.clear()
                del futures, future
                alive.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
            assert engine.pending == 0
    finally:
        gc.enable()
    assert sum(counts.values()) == 2000 and min(counts.values()) > 100 and refused > 100
    assert max(alive[2:]) <= alive[1] + 20  # of the requests that may just be leaving
