"""CUDA graphs: one sampling step recorded once per shape and replayed, so that a step costs the host a few launches.

    graphs = difuse.Graphs()
    images = difuse.sample(model, labels, ..., graphs=graphs)  # the first of a shape records, later ones replay

A graph holds addresses. Everything that changes between replays, the state, the time, the coefficients, the labels and
drawn noise, is copied into buffers that stay where they are; the model's weights are read where they lie, so training
them in place is seen. Images are those of a run without graphs.
"""
import contextlib
import threading
from collections import OrderedDict

import torch

from difuse_kernels.dispatch import forced_backend


class Graphs:
    """Recorded steps, at most `keep` of them, or as many as one call needs: the one used longest ago makes room.

    A step is recorded anew for another model, shape, dtype, autocast or `use_backend`, and where weights have moved to
    other memory since the last call: a callback must not move them. It holds on to its models, and to the memory of one
    step. After a change that moves no weight, such as a new hook, another active adapter or other precision switches of
    torch, call `clear()`. The buffers are shared by all calls: use one Graphs from one thread and one stream at a time.
    """

    def __init__(self, keep=4):
        if not isinstance(keep, int) or keep < 1:
            raise ValueError(f"Graphs: keep is {keep!r}; expected an integer >= 1, the number of recorded steps")
        self.keep = keep
        self._captured = OrderedDict()

    def __len__(self):
        return len(self._captured)

    def clear(self):
        """Forget every recorded step and give its memory back."""
        self._captured.clear()

    def surroundings(self, models):
        """What a recorded step depends on beside what it is given. models: {role: model}, where their weights lie."""
        known = {id(model): model for model in models.values() if isinstance(model, torch.nn.Module)}
        weights = [weight for model in known.values() for weight in (*model.parameters(), *model.buffers())]
        places = tuple([(weight.data_ptr(), weight.dtype, weight.shape, weight.stride()) for weight in weights])
        roles = tuple([(role, id(model), getattr(model, "training", None)) for role, model in models.items()])
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        return roles, places, autocast, forced_backend()

    def bind(self, step, settings, room=1):
        """`step` as a function that replays: step(*inputs) -> a tuple of tensors, inputs tensors or None.

        Results are the graph's own buffers: the next call overwrites them. settings: what else `step` depends on. room:
        how many there are kept at least. Raises ValueError for tensors that are not on a GPU, RuntimeError where the
        step cannot be recorded.
        """
        def replayed(*inputs):
            key = settings, tuple([t if t is None else (t.shape, t.dtype, t.device) for t in inputs])
            captured = self._captured.pop(key, None) or self._record(step, inputs, max(self.keep, room))
            self._captured[key] = captured  # the newest, at the end
            return captured(*inputs)

        return replayed

    def _record(self, step, inputs, most):
        while len(self._captured) >= most:  # first, so that its memory can be used
            self._captured.popitem(last=False)
        return Captured(step, inputs)


class Captured:
    """step(*inputs) -> a tuple of tensors, recorded for tensors of one shape each (None stays None)."""

    def __init__(self, step, inputs):
        with torch.inference_mode(False):  # buffers that may be written in any mode
            self.inputs = [t if t is None else t.clone() for t in inputs]
        self._step = step  # and by it the model, whose weights the graph knows by their addresses

        self.outputs = []

        def advance():
            results = step(*self.inputs)
            self.outputs = self.outputs or [self._buffer(i, result) for i, result in enumerate(results)]
            for buffer, result in reversed(list(zip(self.outputs, results, strict=True))):
                buffer.copy_(result)  # the state last: others may be views of its buffer

        self._replay = record(advance, inputs[0].device)

    def _buffer(self, i, result):
        """Where result i stays: the first, if it is the next state, in the buffer that it is read from."""
        state = self.inputs[0]
        if i == 0 and (result.shape, result.dtype) == (state.shape, state.dtype):
            return state
        with torch.inference_mode(False):
            return torch.empty_like(result)

    def __call__(self, *inputs):
        """The results; they may be given as inputs again."""
        for i, (buffer, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            if given is buffer:
                continue
            if buffer is None or given is None or (given.shape, given.dtype, given.device) != (
                    buffer.shape, buffer.dtype, buffer.device):
                got, expected = ("None" if t is None else f"{tuple(t.shape)} {t.dtype} on {t.device}"
                                 for t in (given, buffer))
                raise ValueError(f"Graphs: input {i} is {got}; the graph was recorded for {expected}. Record another "
                                 "one, as Graphs does by itself")
            buffer.copy_(given, non_blocking=True)
        self._replay()
        return tuple(self.outputs)


_streams = {}  # device -> the stream that steps are recorded on: what libraries keep per stream is kept once
_turns = threading.Lock()  # the stream and the mode that finds waits are the process's
_here = threading.local()


@contextlib.contextmanager
def _turn():
    with _turns:
        _here.recording = True
        try:
            yield
        finally:
            _here.recording = False


def recording():
    """Whether this thread is in `record`: a call in it is part of a recording already, or warms up for one."""
    return getattr(_here, "recording", False)


def record(function, device):
    """A function that replays `function`, which reads and writes tensors that stay where they are.

    Raises what `function` raises, and RuntimeError where it waits for the device: a graph cannot hold that. Another
    thread must not wait for a GPU meanwhile, e.g. in .item() or .cpu(): it would get that error.
    """
    if device.type != "cuda":
        raise ValueError(f"Graphs: the state is on {device}; CUDA graphs need a GPU. Sample without graphs there")
    # autocast's cache of rounded weights dies with its block; a graph that had used it would read freed memory
    uncached = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), False)
    with _turn(), torch.cuda.device(device), uncached:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream()
        stream, before = _streams[device], torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):  # kernels are compiled, libraries set up: not allowed while recording
            function()
            _run_without_waiting(function)
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with (torch.cuda.stream(before),  # also after a failure, which leaves the graph's stream current
              torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")):
            function()
    return graph.replay


def _run_without_waiting(function):
    """Once more before recording: a recording that fails leaves torch's allocator in disorder."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"Graphs: the call cannot be recorded ({error}). A recorded model must not read values back (.item(), "
            ".cpu(), a branch on a tensor); use it without graphs, difuse.accelerate instead of freeze") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
