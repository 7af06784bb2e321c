"""The ops under torch.compile: difuse::<op> and difuse::<op>_backward, torch.library ops with fakes.

Eager calls do not come here: a registered op costs 10 to 20 us a call. While torch.compile traces, `select` decides
where the op will run, by the same refusals as in eager mode, and the backend's name goes into the graph; where that is
the reference, its PyTorch expression is traced instead, for Inductor to fuse.
"""
import torch

_LIBRARY = torch.library.Library("difuse", "FRAGMENT")
# the kernels were chosen for the strides that were traced, so these must arrive
_TAGS = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),)


class Compiled:
    """An op on one backend as torch.compile sees it: called like the reference, differentiated by its own rule."""

    backward = None

    def __init__(self, op, backend, pack, results):
        self.name, self._op, self._pack, self._results = backend, op, pack, results

    def arguments(self, *given):
        """The registered op's arguments."""
        return *self._pack(*given), self.name

    def forward(self, *given):
        """The op's results, one tensor or a tuple of them, without what is saved for the backward pass."""
        outputs = self._op(*self.arguments(*given))
        if isinstance(outputs, torch.Tensor):
            return outputs
        if self._results is None:
            return tuple(outputs)
        outputs = (*outputs, *(None for _ in range(self._results - len(outputs))))[: self._results]
        return outputs[0] if self._results == 1 else outputs


class _Context:
    """Stands in for autograd's ctx where a Function's methods run outside of autograd."""

    saved_tensors = ()

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_tensors):
        pass

    def set_materialize_grads(self, _value):
        pass


def like(tensor, dtype=None):
    """What a kernel returns for a result or gradient shaped like `tensor`: contiguous, uninitialised."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)


def _fresh(tensor, inputs, promised):
    """A registered op's result shares no memory with its inputs and has the strides that the fake promised."""
    shared = any(other is not None and torch._C._is_alias_of(tensor, other) for other in inputs)
    return promised.copy_(tensor) if shared or tensor.stride() != promised.stride() else tensor


def without_nones(tensors):
    """(those there are, the positions of the others): torch.library differentiates no list with a None in it."""
    return [t for t in tensors if t is not None], [i for i, t in enumerate(tensors) if t is None]


def _with_nones(tensors, absent):
    tensors = list(tensors)
    for position in absent:
        tensors.insert(position, None)
    return tensors


def _missing(name, backend):
    """Why the op's backend is not installed, asked once per trace; imports what the trace cannot."""
    from difuse_kernels import library_ops  # noqa: F401  registers the ops: 40 ms that only torch.compile needs
    from difuse_kernels.dispatch import OPS
    return OPS[name].missing(backend) or (OPS[name].implementation(backend) and None)


_missing._dynamo_marked_constant = True  # what assume_constant_result does, less 1.3 s of imports


def select(op, order, inputs):
    """The first of the backends in `order` that takes these (traced) inputs, or None."""
    for backend in order:
        if _missing(op.name, backend) is None and op.implementation(backend).unsupported(op.name, inputs) is None:
            return op.compiled.get(backend) or op.implementation(backend)
    return None


def _running(op, backend, inputs):
    """The implementation that a compiled graph asks for, if it still takes these inputs."""
    reason = op.refusal(backend, inputs)
    if reason is not None:  # the graph was traced on other inputs, or loaded on another machine
        raise RuntimeError(f"{op.name}: compiled for backend '{backend}', which now refuses: {reason}")
    op.chosen[backend, ()] += 1
    return op.implementation(backend)


def _define(name, schema, run, fake):
    _LIBRARY.define(f"{name}({schema}", tags=_TAGS)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"difuse::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.difuse, name).default


def define(op, function, schema, fake, *, context=None, results=1, fake_backward=None, pack=lambda *given: given):
    """Register `op` and its backward from its autograd.Function.

    schema: the function's arguments after the implementation, tensors first ("Tensor x, Tensor? scale, str norm"), and
    what it returns (" -> Tensor"). For a number of tensors that varies "Tensor[] tensors, int[] absent, ...", with the
    positions at which a None belongs, and " -> Tensor[]"; results that are None, at the end, are left out.
    fake(*arguments): what the function returns, as empty tensors. The first `results` are the op's; None: all.
    context: the schema of what the function keeps for its backward pass beside tensors, by the names it has on ctx;
    without it, all arguments that are not tensors.
    fake_backward(grads, saved, *context): the gradients of all tensors, empty, where they are not all shaped like what
    was saved or, if they were not saved, like the first result.
    pack: makes the registered op's arguments of those that the reference takes.
    """
    arguments, returns = schema.split(" -> ")
    listed, returns_list = arguments.startswith("Tensor[]"), returns == "Tensor[]"
    others = [argument for argument in arguments.split(", ") if not argument.startswith("Tensor")]
    constants, context = len(others), ", ".join(others) if context is None else context
    kept = [field.split()[1] for field in context.split(", ")] if context else []

    def flat(inputs):
        """(tensors and Nones, constants) of the registered op's arguments."""
        tensors, values = inputs[: len(inputs) - constants], inputs[len(inputs) - constants :]
        return (_with_nones(tensors[0], values[0]), values[1:]) if listed else (tensors, values)

    def present(outputs):
        return [output for output in outputs if output is not None] if returns_list else outputs

    def run(*inputs):
        *inputs, backend = inputs
        tensors, values = flat(inputs)
        return present(function.forward(_running(op, backend, tuple(tensors)), *tensors, *values))

    def run_fake(*inputs):
        tensors, values = flat(inputs[:-1])
        return present(fake(*tensors, *values))

    def setup_context(ctx, inputs, output):
        *inputs, ctx.backend = inputs
        tensors, values = flat(inputs)
        recorded = _Context()
        function.setup_context(recorded, (None, *tensors, *values), output)
        ctx.save_for_backward(*recorded.saved_tensors)
        ctx.kept = [getattr(recorded, name) for name in kept]
        ctx.at = [next((i for i, saved in enumerate(recorded.saved_tensors) if saved is tensor), -1)
                  for tensor in tensors]
        ctx.absent = inputs[1] if listed else ()
        ctx.nothing = [[] if listed and value == [] else None  # torch compares the nesting, and takes [] for tensors
                       for value in inputs[len(inputs) - constants :]]
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        grads = grads[0] if returns_list else grads
        needs = ctx.needs_input_grad[0] if listed else ctx.needs_input_grad[: len(ctx.at)]
        needs = [bool(need) for need in _with_nones(needs, ctx.absent)]
        found = iter(backward_op(list(grads), list(ctx.saved_tensors), *ctx.kept, ctx.at, needs, ctx.backend))
        found = [next(found) if need else None for i, need in enumerate(needs) if i not in ctx.absent]
        return *([found] if listed else found), *ctx.nothing, None

    def run_backward(grads, saved, *rest):
        *values, _, needs, backend = rest
        ctx = _Context()
        vars(ctx).update(zip(kept, values, strict=True))
        ctx.implementation, ctx.saved_tensors = op.implementation(backend), tuple(saved)
        ctx.needs_input_grad = (False, *needs, *(False for _ in range(constants - listed)))
        padding = [None] * ((results or 0) - len(grads))
        found = function.backward(ctx, *grads, *padding)[1 : 1 + len(needs)]
        found = [grad for grad, need in zip(found, needs, strict=True) if need]
        shapes = run_fake_backward(grads, saved, *rest)
        return [torch.zeros_like(promised) if grad is None else _fresh(grad, grads, promised)
                for grad, promised in zip(found, shapes, strict=True)]

    def run_fake_backward(grads, saved, *rest):
        *values, at, needs, _ = rest
        if fake_backward is None:
            result = next(grad for grad in grads if grad is not None)
            found = [result if i < 0 else saved[i] for i in at]
            return [like(tensor) for tensor, need in zip(found, needs, strict=True) if need]
        return [grad for grad, need in zip(fake_backward(grads, saved, *values), needs, strict=True) if need]

    overload = _define(op.name, f"{arguments}, str backend) -> {returns}", run, run_fake)
    torch.library.register_autograd(f"difuse::{op.name}", backward, setup_context=setup_context, lib=_LIBRARY)
    context = ", ".join(filter(None, (context, "int[] at, bool[] needs, str backend")))
    backward_op = _define(f"{op.name}_backward", f"Tensor?[] grads, Tensor?[] saved, {context}) -> Tensor[]",
                          run_backward, run_fake_backward)
    op.compiled = {backend: Compiled(overload, backend, pack, results) for backend in op.backends[1:]}
