"""Step-level batching: requests at different steps, of different samplers, guidance and seeds, share model calls.

    with difuse.Engine(model, process=VP("linear"), prediction="eps", max_batch=16) as engine:
        future = engine.submit(difuse.Request(label=3, seed=7, steps=50, guidance=1.5))
        image = future.result()  # float32 [C,H,W]; future.cancel() works until the image is there

Models take one time per sample, and every request goes its own way between two calls, so nothing has to agree but the
model. A request joins at the next step after it came, if its rows fit, and leaves when it is done, cancelled or
failed. A row's result does not depend on the rows beside it, except for the rounding of a library's matrix products.
"""
import atexit
import contextlib
import math
import os
import queue
import threading
import traceback
from collections import deque

import torch

from difuse.diffusion.model_calls import learned_variance
from difuse.diffusion.parameterizations import PREDICTIONS
from difuse.diffusion.processes import PROCESSES
from difuse.inference.requests import check_integer, take

_RAISED = "Raised in difuse.Engine:\n"


class Engine:
    """Serves requests on one thread, as many as fit into `max_batch` rows at a time, first come first served.

    model: as for `difuse.sample`, in eval mode; process, prediction: what it was trained with. max_batch: rows of one
    model call. max_waiting: requests that wait for a free row before more are refused. A failure of the model fails
    the requests that cause it: the others are run again without them. The thread is its own: torch.autocast around
    `submit` does not reach it, nor does torch.set_num_threads later on. Close it, or use it in a `with` block, which
    waits for all requests, and cancels them when it is left by an exception. Raises ValueError or TypeError for what
    does not fit.
    """

    def __init__(self, model, *, process, prediction, max_batch=16, max_waiting=256):
        check_integer("max_batch", max_batch, 1, math.inf)
        check_integer("max_waiting", max_waiting, 1, math.inf)
        if not isinstance(process, tuple(PROCESSES.values())):
            raise TypeError(f"Engine: process is {type(process).__name__}; expected one of difuse.diffusion, e.g. VP() "
                            "or Flow()")
        if prediction not in PREDICTIONS:
            raise ValueError(f"Engine: prediction {prediction!r} is unknown; expected one of {', '.join(PREDICTIONS)}")
        if model.training:
            raise ValueError("Engine: the model is in train mode, in which it drops labels; call model.eval() first")
        self._model, self._process, self._prediction = model, process, prediction
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._null = getattr(model, "num_classes", None)
        size = model.config["input_size"]
        self._shape = model.config["in_channels"], size, size
        self._device = next(model.parameters()).device
        self._waiting, self._running = deque(), []
        self._closed = self._computing = False
        self._changed = threading.Condition()
        self._process_id = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="difuse.Engine", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    @property
    def pending(self):
        """The number of requests that were taken and are not done."""
        with self._changed:
            return sum(not each.future.done() for each in (*self._running, *self._waiting))

    def submit(self, request):
        """A concurrent.futures.Future of the image, float32 [C,H,W] on the model's device.

        It can be cancelled until it is done; `running()` stays False till then. Raises, at once, ValueError or
        TypeError for a request that cannot run, queue.Full where max_waiting requests wait, RuntimeError after
        `close` and in a forked process.
        """
        if os.getpid() != self._process_id:
            raise RuntimeError("Engine: it belongs to the process that this one was forked from; make one here")
        taken = take(request, self._process, self._prediction, self._null, self._max_batch, self._device, self._shape)
        with self._changed:
            if self._closed:
                raise RuntimeError("Engine: it is closed and takes no more requests")
            if self._beyond() >= self._max_waiting:
                raise queue.Full(f"Engine: {self._max_waiting} requests wait already; try again later, or give it a "
                                 "larger max_waiting")
            self._waiting.append(taken)
            self._changed.notify()
        return taken.future

    def close(self, cancel=False):
        """Take no more requests and wait for those taken; with `cancel`, cancel them first. May be called again."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("Engine: close was called by a callback, on the thread that it waits for")
        if os.getpid() == self._process_id:
            self._stop(cancel)
            self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close(cancel=kind is not None)

    def _stop(self, cancel):
        with self._changed:
            self._closed = True
            left = [*self._waiting, *self._running]
            self._changed.notify()
        for each in left if cancel else ():  # not under the lock: cancelling runs somebody's callbacks
            each.future.cancel()

    def _at_exit(self):
        if os.getpid() == self._process_id:
            self._stop(cancel=True)
            while self._computing:  # a kernel must not outlive the interpreter; a callback that waits for it may
                self._thread.join(0.01)
            self._thread.join(1)

    def _beyond(self):
        """How many requests wait that do not fit in now."""
        free = self._max_batch - sum(len(each.labels) for each in self._running if not each.future.done())
        beyond = 0
        for each in self._waiting:
            if not each.future.done():
                free -= len(each.labels)
                beyond += free < 0
        return beyond

    def _serve(self):
        cause = None
        try:
            with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
                while (running := self._next()) is not None:
                    if running:
                        self._advance(running)
        except BaseException as error:
            cause = error
            raise
        finally:  # nobody shall wait for a thread that is gone
            with self._changed:
                self._closed = True
                left = [*self._running, *self._waiting]
            for each in left:
                ended = RuntimeError("Engine: its thread ended")
                ended.__cause__ = cause
                try:
                    each.settle(ended)
                except BaseException:  # of a callback of that future; the others come all the same
                    traceback.print_exc()
            atexit.unregister(self._at_exit)

    def _next(self):
        """The requests of the next step, started. Waits for some; None when all is done."""
        with self._changed:
            while True:
                self._running = [each for each in self._running if not each.is_over()]
                self._waiting = deque(each for each in self._waiting if not each.is_over())
                rows = sum(len(each.labels) for each in self._running)
                while self._waiting and rows + len(self._waiting[0].labels) <= self._max_batch:
                    self._running.append(self._waiting.popleft())
                    rows += len(self._running[-1].labels)
                if self._running:
                    break
                if self._closed:
                    return None
                self._changed.wait()
            running = list(self._running)
        for each in running:
            if each.x is None:
                try:
                    each.start(self._shape, self._device)
                except BaseException as error:
                    each.settle(_released(error))
        return [each for each in running if not each.over]

    def _advance(self, running):
        """One call for these. If the model fails, for each half by itself, down to the requests that make it fail."""
        answers, error = self._try(running)
        if error is None:
            for each, answer in zip(running, answers, strict=True):
                self._give(each, answer)
        elif len(running) == 1:
            running[0].settle(error)
        else:
            middle = len(running) // 2
            self._advance(running[:middle])
            self._advance(running[middle:])

    def _try(self, running):
        """(answers, None), or (None, the error)."""
        self._computing = True
        try:
            return self._call(running), None
        except BaseException as error:
            return None, _released(error)
        finally:
            self._computing = False

    @torch.no_grad()
    def _give(self, each, answer):
        """Its answers to a request, which goes on to its next call, or to its end."""
        try:
            over = each.advance(answer)
        except BaseException as error:  # of its callback, or a step that is not finite
            each.settle(_released(error))
            return
        if over and not each.over:
            if each.x.is_cuda:  # the image is there, not only under way, whatever stream its reader is on
                torch.cuda.current_stream(each.x.device).synchronize()
            each.settle()

    @torch.no_grad()
    def _call(self, running):
        """The answers to the next calls of these n requests, [1,C,H,W] per source: one call of the model."""
        asked = [each.run.advance() for each in running]  # (call, x [1,C,H,W]): again the same, if it failed before
        channels = self._shape[0]
        guided = torch.tensor([i for i, (call, _) in enumerate(asked) if len(call.sources) == 2], dtype=torch.int64)
        t = torch.stack([each.times[each.called] for each in running])
        labels = [each.labels[0] for each in running] + [self._null] * len(guided)
        y = None if self._null is None else torch.tensor(labels)  # [R], the conditional rows first
        t, y, guided = map(self._on_device, (torch.cat((t, t[guided])), y, guided))  # [R]
        x = torch.cat([x for _, x in asked])  # [n,C,H,W]
        rows = torch.cat((x, x[guided]))  # [R,C,H,W]
        out = self._model(rows, t) if y is None else self._model(rows, t, y)
        if out.shape not in ((len(rows), channels, *x.shape[2:]), (len(rows), 2 * channels, *x.shape[2:])):
            raise ValueError(f"Engine: the model returned shape {tuple(out.shape)}; expected {tuple(rows.shape)}, or "
                             "twice the channels with a learned sigma")
        null, answers = len(running), []
        for i, (call, _) in enumerate(asked):
            mine = [i, null][: len(call.sources)]
            null += len(mine) - 1
            found = [out[row : row + 1, :channels].clone() for row in mine]  # no views, which would keep the batch
            variance = out[i : i + 1, channels:].clone()
            learned = running[i].program.learned
            answers.append((*found, learned_variance("Engine", variance, learned, found[0])))
        return answers

    def _on_device(self, tensor):
        if tensor is None or self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)  # else the copy would wait for the GPU


def _released(error):
    """The error with its traceback as a note: frames, kept with it, would hold whole batches."""
    if not any(note.startswith(_RAISED) for note in getattr(error, "__notes__", ())):  # raised before
        error.add_note(_RAISED + "".join(traceback.format_exception(error)))
    seen, each = set(), error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error
