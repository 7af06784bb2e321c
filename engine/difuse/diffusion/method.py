"""How a sampler is written: as the paper has it, on states and predictions that do not exist yet.

    def ddim(x, path):
        for t, s in steps_of(path):
            m = yield Predict(x, t)             # one call of the model at node t
            x = s.alpha * m.x0 + s.sigma * m.eps
            yield x                             # the state after this step

A method is a generator. x is a `Combination`; so are the prediction's forms m.x0, m.eps, m.flow, m.score, what
`yield NOISE` gives, what `yield Weights(function, x, ...)` gives, which are w_j * x_j with weights that depend on norms
and inner products, and what `yield Nonlinear(function, x, ...)` gives, which is function(tensor, ...). `record` runs
the method once, before any tensor is there, and returns the `Program` of it.

Functions of one value are one recorded graph (see `difuse.Graphs`): what changes from step to step belongs into
coefficients, not into them.
"""
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from difuse.diffusion.node import Node
from difuse.diffusion.parameterizations import coefficients
from difuse.diffusion.program import Apply, Call, Combination, Done, Draw, Program, Recorder, Weigh, number

steps_of = pairwise  # (t, s) of every step: where it starts and where it ends


@dataclass(frozen=True)
class Predict:
    """Ask for the model's prediction at x, a state at `node`."""

    x: Combination
    node: Node


class Weights:
    """Ask for [w_j * input_j] with weights of each sample, function(G), G being the inputs' `gram`; see `Weigh`."""

    def __init__(self, function: Callable, *inputs):
        self.function, self.inputs = function, inputs


class Nonlinear:
    """Ask for function(*tensors), which must not write to them."""

    def __init__(self, function: Callable, *inputs):
        self.function, self.inputs = function, inputs


NOISE = object()  # ask for fresh standard normal noise


class Prediction:
    """What the model said at x, in each of its forms; `variance` is its learned one's output, in [-1, 1]."""

    def __init__(self, x, m, node, prediction, variance=None):
        self._x, self._m, self._node, self._prediction, self.variance = x, m, node, prediction, variance

    def _as(self, form):
        c_x, c_m = coefficients(self._prediction, form, self._node.alpha, self._node.sigma)
        return c_x * self._x + c_m * self._m

    x0 = property(lambda self: self._as("x0"))
    eps = property(lambda self: self._as("eps"))
    flow = property(lambda self: self._as("flow"))
    score = property(lambda self: self._as("score"))


def record(method, path, prediction, guidance, *, prior=1.0, labels=None, given=(), clip=None, preview=False):
    """The `Program` of a method, a generator function of (x, path), on the nodes of `path`, noise first.

    prior: the state at its start is prior * (the noise, tensor 0). guidance: a `Guidance`, which says what the model is
    asked for at each step and how its answers make one. labels: for a classifier in it. given: of "image", "mask", in
    this order: tensors 1 and 2. The state starts from the image with noise; where the mask is 0, it stays so. clip: a
    function of each predicted x0, what it returns taking its place. preview: the end of each step knows the last x0.
    """
    recorder, step, memory = Recorder(), 0, {"labels": labels}
    noise, *given = [recorder.tensor() for _ in range(1 + len(given))]
    x = path[0].alpha * given[0] + path[0].sigma * noise if given else prior * noise
    running = method(x, path)
    answer = x0 = None
    while True:
        try:
            request = running.send(answer)
        except StopIteration:
            break
        answer = None
        if request is NOISE:
            answer, = recorder.add(Draw)
        elif isinstance(request, Weights):
            answer = recorder.add(Weigh, *request.inputs, results=len(request.inputs), function=request.function)
        elif isinstance(request, Nonlinear):
            answer, = recorder.add(Apply, *request.inputs, function=request.function)
        elif isinstance(request, Predict):
            x = request.node.scale * request.x
            recorder.write([x, request.x, *_alive(running), *_combinations(memory)])
            sources = guidance.sources(step, len(path) - 1)
            *outputs, variance = recorder.add(Call, x, results=len(sources) + 1, node=request.node, step=step,
                                              sources=sources)
            m = guidance.mixed(recorder, outputs, x, request.node, prediction, step, len(path) - 1, memory)
            answer = Prediction(request.x, m, request.node, prediction, variance)
            if clip:
                x0, = recorder.add(Apply, answer.x0, function=clip)
                answer = Prediction(request.x, x0, request.node, "x0", variance)
            x0 = answer.x0 if preview else None
        else:
            step += 1
            recorder.own(request)
            recorder.write([request, *_alive(running), *_combinations([memory, x0])])
            if len(given) == 2:
                image, mask = given
                known = path[step].alpha * image + path[step].sigma * noise
                kept, = recorder.add(Apply, known, request, mask, function=torch.lerp)  # the state where the mask is 1
                request.terms = kept.terms
            recorder.add(Done, request, *_combinations([x0]), results=0, step=step - 1)
            x = request
    return Program(recorder.instructions, [number(x)])


def _alive(running):
    """The combinations that the method's variables hold: they may be needed after tensors they are made of are gone.

    This only keeps a step narrow. One that is missed stays the sum that it is, of tensors that are kept for it.
    """
    found = []
    while running is not None:
        found += _combinations(running.gi_frame.f_locals)
        running = running.gi_yieldfrom
    return found


def _combinations(value):
    if isinstance(value, Combination):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [found for each in value for found in _combinations(each)]
