"""Step-level batching: requests at different steps, of different samplers, guidance and seeds, share model calls.

    with difuse.Engine(model, process=VP("linear"), prediction="eps", max_batch=16) as engine:
        future = engine.submit(difuse.Request(label=3, seed=7, steps=50, guidance=1.5))
        image = future.result()  # float32 [C,H,W]; future.cancel() works until the image is there

Models take one time per sample, and a sampler's step is a row of coefficients per sample, so nothing has to agree but
the model. A request joins at the next step after it came, if its rows fit, and leaves when it is done, cancelled or
failed. A row's result does not depend on the rows beside it, except for the rounding of a library's matrix products.
"""
import atexit
import difflib
import math
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from difuse.diffusion.samplers import STEPS, initial_noise
from difuse_kernels import sampler_step


@dataclass(frozen=True)
class Request:
    """One image. label: a class, None for a model without classes. seed: its noise, as `initial_noise` draws it.

    sampler: "ddpm", "ddim" or "flow_euler"; steps: its number of model calls; eta: ddim's. guidance: classifier-free
    guidance w, 1 for none; others need two rows of the model's batch. callback(step, x [C,H,W]) is called after each
    step, on the engine's thread: what it takes, every request waits for.
    """

    label: int | None
    seed: int
    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 1.5
    eta: float = 0.0
    callback: Callable | None = None


class _Taken:
    """A request and where it is: its state x [C,H,W] after `step` steps, both None while it waits."""

    def __init__(self, request, method, null):
        self.request, self.future, self.over = request, Future(), False
        self.labels = [request.label] if request.guidance == 1 else [request.label, null]  # of its rows
        self.times, self.std = method.times, method.std.tolist()
        self.table = method.table((request.guidance, 1 - request.guidance))  # [steps,4]
        self.x = self.z = self.step = None

    def start(self, shape, device):
        noise, (self.generator,) = initial_noise(shape, [self.request.seed], device)
        self.x, self.step = noise[0], 0

    def noise(self):
        """This step's z [C,H,W] on the CPU, drawn once even if the step is run again; none where it has no weight."""
        if self.z is None:
            self.z = torch.zeros(self.x.shape)
            if self.std[self.step] > 0:
                self.z.normal_(generator=self.generator)
        return self.z

    def advance(self, x):
        """One step is done; its result is x."""
        self.x, self.z, self.step = x, None, self.step + 1

    def settle(self, error=None):
        """Give the future its image or this error; if it was cancelled, tell those who wait for it. Once."""
        if not self.over and self.future.set_running_or_notify_cancel():
            if error is None:
                self.future.set_result(self.x)
            else:
                self.future.set_exception(error)
        self.over = True

    def is_over(self):
        if self.future.cancelled():
            self.settle()
        return self.over


class Engine:
    """Serves requests on one thread, as many as fit into `max_batch` rows at a time, first come first served.

    model: as for `difuse.sample`, in eval mode; process, prediction: what it was trained with. max_batch: rows of one
    model call. max_waiting: requests beyond the running ones that it takes before it refuses. len(engine): requests
    taken and not done. A failure of the model fails the requests that cause it: the others are run again without
    them. The thread is its own: a torch.autocast block around `submit` does not reach it. Close it, or use it in a
    `with` block, which waits for all requests, and cancels them when it is left by an exception. Raises ValueError or
    TypeError for what does not fit.
    """

    def __init__(self, model, *, process, prediction, max_batch=16, max_waiting=256):
        for name, value in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Engine: {name} is {value!r}; expected an integer >= 1")
        if model.training:
            raise ValueError("Engine: the model is in train mode, in which it drops labels; call model.eval() first")
        self._model, self._process, self._prediction = model, process, prediction
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._null = getattr(model, "num_classes", None)
        size = model.config["input_size"]
        self._shape = model.config["in_channels"], size, size
        self._device = next(model.parameters()).device
        self._waiting, self._running, self._closed = deque(), [], False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="difuse.Engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, cancel=True)  # a thread inside a kernel must not outlive the interpreter

    def __len__(self):
        with self._changed:
            return sum(not each.future.done() for each in (*self._running, *self._waiting))

    def submit(self, request):
        """A concurrent.futures.Future of the image, float32 [C,H,W] on the model's device.

        It can be cancelled until it is done; `running()` stays False till then. Raises, at once, ValueError or
        TypeError for a request that cannot run, queue.Full where max_waiting requests wait, RuntimeError after
        `close`.
        """
        taken = self._checked(request)
        with self._changed:
            if self._closed:
                raise RuntimeError("Engine: it is closed and takes no more requests")
            if len(self._waiting) >= self._max_waiting:
                self._waiting = deque(each for each in self._waiting if not each.is_over())
            if len(self._waiting) >= self._max_waiting:
                raise queue.Full(f"Engine: {len(self._waiting)} requests wait already; try again later, or give it a "
                                 "larger max_waiting")
            self._waiting.append(taken)
            self._changed.notify()
        return taken.future

    def close(self, cancel=False):
        """Take no more requests and wait for those taken; with `cancel`, cancel them first. May be called again."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("Engine: close was called by a callback, on the thread that it waits for")
        with self._changed:
            self._closed = True
            if cancel:
                for each in (*self._waiting, *self._running):
                    each.future.cancel()
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close(cancel=kind is not None)

    def _checked(self, request):
        if not isinstance(request, Request):
            raise TypeError(f"Engine: the request is {type(request).__name__}; expected a difuse.Request")
        if request.sampler not in STEPS:
            near = difflib.get_close_matches(str(request.sampler), STEPS, n=1, cutoff=0)[0]
            raise ValueError(f"Engine: sampler {request.sampler!r} is unknown; did you mean {near!r}? Expected one of "
                             f"{', '.join(STEPS)}")
        if request.eta and request.sampler != "ddim":
            raise ValueError(f"Engine: eta is {request.eta} with {request.sampler}; only ddim takes one")
        if isinstance(request.seed, bool) or not isinstance(request.seed, int):
            raise TypeError(f"Engine: seed is {request.seed!r}; expected an integer")
        if not math.isfinite(request.guidance):
            raise ValueError(f"Engine: guidance is {request.guidance}; expected a finite number")
        if self._null is None:
            if request.label is not None or request.guidance != 1:
                raise ValueError(f"Engine: label {request.label!r} with guidance {request.guidance}, but the model has "
                                 "no classes (num_classes); expected label=None and guidance=1")
        elif isinstance(request.label, bool) or not isinstance(request.label, int):
            raise TypeError(f"Engine: label is {request.label!r}; expected an integer")
        elif not 0 <= request.label <= self._null:
            raise ValueError(f"Engine: label is {request.label}; expected 0 to {self._null - 1}, or {self._null} for "
                             "the null class")
        if request.guidance != 1 and self._max_batch < 2:
            raise ValueError("Engine: guidance needs two rows; expected max_batch >= 2, or guidance=1")
        options = {"eta": request.eta} if request.sampler == "ddim" else {}
        method = STEPS[request.sampler](self._process, request.steps, self._prediction, **options)
        return _Taken(request, method, self._null)

    def _serve(self):
        try:
            while self._admit():
                self._advance(self._running)
        except BaseException as error:  # nobody shall wait for a thread that is gone
            with self._changed:
                self._closed = True
                for each in (*self._running, *self._waiting):
                    each.settle(error)
            raise

    def _admit(self):
        """Let go of what is over and take in what fits, waiting for something to do; False when all is done."""
        with self._changed:
            while True:
                self._running = [each for each in self._running if not each.is_over()]
                rows = sum(len(each.labels) for each in self._running)
                while self._waiting and rows + len(self._waiting[0].labels) <= self._max_batch:
                    each = self._waiting.popleft()
                    if not each.is_over():
                        each.start(self._shape, self._device)
                        self._running.append(each)
                        rows += len(each.labels)
                if self._running:
                    return True
                if self._closed:
                    return False
                self._changed.wait()

    @torch.no_grad()
    def _advance(self, running):
        """One step for these. If the model fails, for each half by itself, down to the requests that make it fail."""
        try:
            states = self._step(running)
        except Exception as error:
            if len(running) == 1:
                running[0].settle(error)
                return
            middle = len(running) // 2
            self._advance(running[:middle])
            self._advance(running[middle:])
            return
        for each, x in zip(running, states.unbind(), strict=True):
            each.advance(x.clone())  # not a view, which would keep the whole batch
            self._report(each)

    def _report(self, each):
        try:
            if each.request.callback is not None and not each.future.cancelled():
                each.request.callback(each.step - 1, each.x.clone())
        except Exception as error:
            each.settle(error)
        else:
            if each.step == len(each.std):
                each.settle()

    def _step(self, running):
        """The next states [n,C,H,W] of n requests: one call of the model and one update."""
        n, channels = len(running), self._shape[0]
        guided = [i for i, each in enumerate(running) if len(each.labels) == 2]
        x = torch.stack([each.x for each in running])  # [n,C,H,W]
        t = torch.stack([each.times[each.step] for each in running])  # [n]
        table = torch.stack([each.table[each.step] for each in running])[:, None].to(self._device)  # [n,1,4]
        rows = torch.cat((x, x[guided]))  # [R,C,H,W], the conditional rows first
        t = torch.cat((t, t[guided])).to(self._device)  # [R]
        if self._null is None:
            out = self._model(rows, t)
        else:
            labels = [each.labels[0] for each in running] + [self._null] * len(guided)
            out = self._model(rows, t, torch.tensor(labels, device=self._device))
        if out.shape not in ((len(rows), channels, *x.shape[2:]), (len(rows), 2 * channels, *x.shape[2:])):
            raise ValueError(f"Engine: the model returned shape {tuple(out.shape)}; expected {tuple(rows.shape)}, or "
                             "twice the channels with a learned sigma")
        null = list(range(n))  # a request without guidance takes its own output there, with the weight 1 - w = 0
        for row, i in enumerate(guided):
            null[i] = n + row
        inputs = (x, out[:n, :channels], out[null][:, :channels])
        if any(each.std[each.step] for each in running):
            inputs += (torch.stack([each.noise() for each in running]).to(self._device),)
        return sampler_step(inputs, table[..., : len(inputs)], out_dtypes=(torch.float32,))[0]
