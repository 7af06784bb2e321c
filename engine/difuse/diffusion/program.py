"""What a sampler does, recorded before it runs: model calls, noise, and linear maps of a few tensors between them.

A method computes with `Combination`s, sums of tensors that do not exist yet, in float64. `Recorder.write` turns those
that must become tensors into one `Map`, which is one call of `sampler_step`: guidance, conversions of the prediction,
a solver's history and its noise are columns of one matrix, whatever the method. Where coefficients depend on norms and
inner products of the tensors, `Weigh` finds them, sample by sample, in one pass of `gram`. Operations that are not even
that are `Apply` instructions on tensors. Every tensor has a number of its own and is written once; `Program` drops what
nobody reads and knows when each tensor is read last.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

_MAX_INPUTS, _MAX_OUTPUTS = 8, 4  # of one sampler_step


class Combination:
    """sum_i c_i * tensor_i: `terms` is {number of the tensor: c_i}."""

    __slots__ = ("terms",)
    __array_ufunc__ = None  # numpy's numbers leave products to us

    def __init__(self, terms):
        self.terms = terms

    def __add__(self, other):
        if not isinstance(other, Combination):
            return NotImplemented
        terms = dict(self.terms)
        for tensor, c in other.terms.items():
            terms[tensor] = terms.get(tensor, 0.0) + c
        return Combination(terms)

    def __mul__(self, number):
        return Combination({tensor: float(number) * c for tensor, c in self.terms.items()})

    __rmul__ = __mul__

    def __sub__(self, other):
        return self + -1.0 * other

    def __neg__(self):
        return -1.0 * self

    def __truediv__(self, number):
        return Combination({tensor: c / float(number) for tensor, c in self.terms.items()})


@dataclass(frozen=True, eq=False)
class Map:
    """outputs_i = sum_j coefficients[i,j] * inputs_j, in one pass."""

    inputs: tuple
    outputs: tuple
    coefficients: np.ndarray  # float64 [I,J]


@dataclass(frozen=True, eq=False)
class Weigh:
    """outputs_j = w_j * inputs_j with weights of each sample; not written, see run.py.

    function(G [B,J+1,J+1]), of the inputs' `gram`, returns the J weights, [B] or float; G is of numpy on CPUs, so
    that it computes with operators and methods that numpy and torch share.
    """

    inputs: tuple
    outputs: tuple
    function: Callable


@dataclass(frozen=True, eq=False)
class Call:
    """The model on inputs[0] at `node`, once for each of `sources`, which guidance mixes; see guidance.py."""

    inputs: tuple
    outputs: tuple
    node: object
    step: int
    sources: tuple


@dataclass(frozen=True, eq=False)
class Draw:
    """Standard normal noise."""

    inputs: tuple
    outputs: tuple


@dataclass(frozen=True, eq=False)
class Apply:
    """outputs[0] = function(*inputs), which is not linear. It must not write to its inputs."""

    inputs: tuple
    outputs: tuple
    function: Callable


@dataclass(frozen=True, eq=False)
class Done:
    """A step is over; inputs are the state and, if it is wanted, the predicted x0."""

    inputs: tuple
    outputs: tuple
    step: int


class Recorder:
    """Collects instructions."""

    def __init__(self):
        self.instructions, self._count = [], 0
        self._weighted, self._answers = {}, set()  # {weighted tensor: the tensor}; a model's, of any dtype

    def tensor(self):
        """A new tensor, as a combination of itself."""
        self._count += 1
        return Combination({self._count - 1: 1.0})

    def add(self, kind, *inputs, results=1, **fields):
        """One more instruction that reads these combinations; its results, new tensors."""
        self.write(inputs if kind is not Apply else ())
        self.write(inputs if kind is Apply else inputs[1:] if kind is Done else (), zeros=True)
        outputs = [self.tensor() for _ in range(results)]
        self.instructions.append(kind(inputs=tuple(map(number, inputs)), outputs=tuple(map(number, outputs)), **fields))
        if kind is Call:
            self._answers.update(self.instructions[-1].outputs)
        if kind is Weigh:
            self._weighted |= zip(self.instructions[-1].outputs, self.instructions[-1].inputs, strict=True)
        return outputs

    def own(self, combination):
        """Let this, if it is a model's answer as it came, be a tensor of the state's dtype and of its own."""
        terms = tuple((tensor, c) for tensor, c in combination.terms.items() if c != 0)
        if len(terms) == 1 and terms[0][1] == 1 and terms[0][0] in self._answers:
            self._map([(terms, [combination])])

    def write(self, combinations, zeros=False):
        """Let each of these be one tensor from here on, the same object as before; zeros: also where it is 0."""
        rows = {}  # what is to be written: [the combinations that are this]
        for combination in combinations:
            terms = {tensor: c for tensor, c in combination.terms.items() if c != 0}
            if not np.isfinite(list(terms.values())).all():
                raise ValueError(f"the coefficients of a step are {list(terms.values())}; expected finite numbers")
            if not terms and zeros:
                terms = dict.fromkeys(list(combination.terms)[:1], 0.0)
            if list(terms.values()) == [1.0] and not terms.keys() & self._weighted.keys():
                combination.terms = terms
            elif terms:
                rows.setdefault(tuple(sorted(terms.items())), []).append(combination)
        pending = list(rows.items())
        while pending:
            part, pending = pending[:_MAX_OUTPUTS], pending[_MAX_OUTPUTS:]
            self._map(part)

    def _map(self, rows):
        """One `Map`. rows: [(terms, [the combinations that are this])]."""
        inputs = sorted({tensor for terms, _ in rows for tensor, _ in terms})
        width = len({self._weighted.get(tensor, tensor) for tensor in inputs})
        if width > _MAX_INPUTS:
            raise ValueError(f"a step reads {width} tensors at once; expected at most {_MAX_INPUTS}")
        outputs = [self.tensor() for _ in rows]
        coefficients = np.array([[dict(terms).get(tensor, 0.0) for tensor in inputs] for terms, _ in rows])
        self.instructions.append(Map(tuple(inputs), tuple(map(number, outputs)), coefficients))
        for (_, same), output in zip(rows, outputs, strict=True):
            for combination in same:
                combination.terms = dict(output.terms)


def number(combination):
    """The number of the one tensor that this is."""
    if list(combination.terms.values()) != [1.0]:
        raise ValueError("a step's state, or what it needs the norm of, is 0 whatever the model says; expected a "
                         "coefficient that is not")
    return next(iter(combination.terms))


class Program:
    """Instructions without those that nobody reads; `dropped[i]` are the tensors that instruction i reads last."""

    def __init__(self, instructions, results=()):
        needed, kept = set(results), []
        for instruction in reversed(instructions):
            if isinstance(instruction, Map):
                instruction = _pruned(instruction, needed)
            elif isinstance(instruction, (Draw, Weigh, Apply)) and not needed & set(instruction.outputs):
                instruction = None
            if instruction is not None:
                needed -= set(instruction.outputs)
                needed |= set(instruction.inputs)
                kept.append(instruction)
        self.instructions = kept[::-1]
        self.calls = [each for each in self.instructions if isinstance(each, Call)]
        self.draws = any(isinstance(each, Draw) for each in self.instructions)
        read = {tensor for each in self.instructions for tensor in each.inputs}
        self.learned = any(call.outputs and call.outputs[-1] in read for call in self.calls)  # a variance is asked for
        seen, self.dropped = set(results), []
        for instruction in kept:
            tensors = {*instruction.inputs, *instruction.outputs}
            self.dropped.append(tuple(tensors - seen))
            seen |= tensors
        self.dropped.reverse()

    def tables(self, device, dtype=torch.float32):
        """The coefficients of every map [I,J], views of one tensor on the device; None for other instructions."""
        maps = [each.coefficients for each in self.instructions if isinstance(each, Map)]
        flat = np.concatenate([each.reshape(-1) for each in maps]) if maps else np.zeros(0)
        parts = iter(to_device(torch.from_numpy(flat).to(dtype), device).split([each.size for each in maps]))
        return [next(parts).reshape(each.coefficients.shape) if isinstance(each, Map) else None
                for each in self.instructions]

    def segments(self):
        """The instructions step by step, as `Segment`s."""
        segments, first = [], 0
        for i, instruction in enumerate(self.instructions):
            if isinstance(instruction, Done):
                segments.append(Segment(self, first, i + 1))
                first = i + 1
        return segments


class Segment:
    """The instructions of a step, the tensors it reads, those that are there after it, `Done`'s first, its structure.

    What an earlier step wrote and a later one needs passes through: it is read and written here too. Segments of one
    structure do the same to other tensors, at other times and with other coefficients.
    """

    def __init__(self, program, first, end):
        self.first, self.instructions = first, program.instructions[first:end]
        before = {tensor for each in program.instructions[:first] for tensor in each.outputs}
        later = {tensor for each in program.instructions[end:] for tensor in each.inputs}
        written, self.reads = set(), []
        for each in self.instructions:
            self.reads += [tensor for tensor in each.inputs if tensor not in written and tensor not in self.reads]
            written |= set(each.outputs)
        self.reads += sorted(before & later - set(self.reads))
        done = self.instructions[-1].inputs
        self.writes = [*dict.fromkeys(done), *sorted((written | before) & later - set(done))]
        names = {}
        for tensor in (*self.reads, *(tensor for each in self.instructions for tensor in each.outputs)):
            names.setdefault(tensor, len(names))
        self.structure = (tuple(names[tensor] for tensor in self.writes),
                          *((type(each).__name__, tuple(names[tensor] for tensor in each.inputs),
                             tuple(names[tensor] for tensor in each.outputs), getattr(each, "sources", None),
                             getattr(each, "function", None)) for each in self.instructions))


def to_device(tensor, device):
    """A copy there that the host does not wait for."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _pruned(instruction, needed):
    rows = [i for i, output in enumerate(instruction.outputs) if output in needed]
    columns = [j for j in range(len(instruction.inputs)) if instruction.coefficients[rows, j].any()] or [0]
    if not rows:
        return None
    return Map(tuple(instruction.inputs[j] for j in columns), tuple(instruction.outputs[i] for i in rows),
               instruction.coefficients[np.ix_(rows, columns)])
