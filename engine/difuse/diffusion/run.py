"""A recorded program at work on tensors: what each instruction does, and where a run is."""
from typing import NamedTuple

import numpy as np
import torch

from difuse.diffusion.program import Apply, Call, Draw, Map, Weigh
from difuse_kernels import gram, sampler_step


class Weighted(NamedTuple):
    """weight, [B] or a number, times tensor [B,...], never written: maps read the tensor and multiply its column."""

    tensor: torch.Tensor
    weight: object


def weigh(function, inputs):
    """What a `Weigh` gives: the inputs, each `Weighted`."""
    G = gram(inputs)  # [B,J+1,J+1]
    if G.is_cpu:
        G = G.numpy()  # a microsecond for what takes torch five
    return list(map(Weighted, inputs, function(G)))


def mapped(inputs, coefficients, dtype):
    """What a `Map` gives: one sampler_step of these tensors, or `Weighted` ones, with coefficients [I,J]."""
    for x in inputs:
        if type(x) is Weighted:
            inputs, coefficients = _unweighted(inputs, coefficients)
            break
    return sampler_step(inputs, coefficients, out_dtypes=(dtype,) * coefficients.shape[-2])


def _unweighted(inputs, coefficients):
    """The tensors behind these inputs, each once, and their coefficients [B,I,J] for each sample."""
    tensors = [x.tensor if type(x) is Weighted else x for x in inputs]
    shape = tensors[0].shape[0], len(inputs)
    if coefficients.is_cpu:
        table = coefficients.numpy()
        weights = np.ones(shape, table.dtype)
    else:
        table, weights = coefficients, coefficients.new_ones(shape)
    for j, x in enumerate(inputs):
        if type(x) is Weighted:
            weights[:, j] = x.weight
    columns = table * weights[:, None]  # [B,I,J]
    places = {}
    for j, x in enumerate(tensors):
        first, _ = places.setdefault(id(x), (j, x))
        if first != j:
            columns[:, :, first] += columns[:, :, j]
    if len(places) < len(tensors):
        kept = [j for j, _ in places.values()]
        tensors = [tensors[j] for j in kept]
        columns = (np if coefficients.is_cpu else torch).stack([columns[:, :, j] for j in kept], -1)
    if coefficients.is_cpu:
        columns = torch.from_numpy(columns)
    return tensors, columns


def as_state(answer, x):
    """What a callback returned to take the place of x, checked."""
    if answer.shape != x.shape or answer.dtype != x.dtype:
        raise ValueError(f"the callback returned {answer.dtype} {tuple(answer.shape)} as the state; expected {x.dtype} "
                         f"{tuple(x.shape)}")
    return answer


class Run:
    """A program at work on tensors: `advance` to the next model call, `give` its outputs, until `x` is the result.

    tensors: those that are given, the noise [B,...] first. draw: a function that returns standard normal noise. done:
    a function of (step, x, ...) after each step, whose result, if it is a tensor, takes the state's place; False ends
    it. tables: the program's, if they are there already.
    """

    def __init__(self, program, tensors, draw, done=None, tables=None):
        self.program, self._draw, self._done = program, draw, done
        self.x, self.tensors, self._at = tensors[0], dict(enumerate(tensors)), 0
        self._tables = tables or program.tables(self.x.device, self.x.dtype)

    def advance(self):
        """The next `Call` and its input; None at the end."""
        instructions, tensors = self.program.instructions, self.tensors
        while self._at < len(instructions):
            instruction = instructions[self._at]
            kind, inputs = type(instruction), [tensors[tensor] for tensor in instruction.inputs]
            if kind is Call:
                return instruction, inputs[0]
            if kind is Map:
                self.give(mapped(inputs, self._tables[self._at], self.x.dtype))
            elif kind is Draw:
                self.give((self._draw(),))
            elif kind is Weigh:
                self.give(weigh(instruction.function, inputs))
            elif kind is Apply:
                self.give((instruction.function(*inputs),))
            elif self._finished(instruction, *inputs):
                break
        return None

    def give(self, outputs):
        """The results of the instruction it is at, which is over."""
        tensors = self.tensors
        for tensor, output in zip(self.program.instructions[self._at].outputs, outputs, strict=True):
            tensors[tensor] = output
        for tensor in self.program.dropped[self._at]:
            del tensors[tensor]
        self._at += 1

    def _finished(self, done, x, *preview):
        """The end of a step; whether sampling ends with it."""
        self.x = x
        answer = None if self._done is None else self._done(done.step, x, *preview)
        if isinstance(answer, torch.Tensor):
            self.x = self.tensors[done.inputs[0]] = as_state(answer, x)
        self.give(())
        return answer is False
