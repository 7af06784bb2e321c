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

    def __init__(self, op, backend, results):
        self.name, self.results, self._op, self._backend = backend, results, op, backend

    def forward(self, *arguments):
        """The op's results, one tensor or a tuple of them, without what is saved for the backward pass."""
        outputs = self._op(*arguments, self._backend)
        if isinstance(outputs, torch.Tensor):
            return outputs
        return outputs[: self.results] if self.results > 1 else outputs[0]


class _Context:
    """Stands in for autograd's ctx where a Function's methods run outside of autograd."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_tensors):
        pass

    def set_materialize_grads(self, _value):
        pass


def like(tensor, dtype=None):
    """What a kernel returns for a result or gradient shaped like `tensor`: contiguous, uninitialised."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)


def _fresh(tensor, inputs):
    """An op's result may not be one of its inputs, and has the strides that the fake promised."""
    return tensor.clone() if any(tensor is other for other in inputs) else tensor.contiguous()


def register(op, schema, run, fake, *, results, backward=None, setup_context=None):
    """Define difuse::<op> with `schema` (arguments, then returns), to be called with the backend's name last."""
    arguments, returns = schema.split(" -> ")
    name = f"difuse::{op.name}"
    _LIBRARY.define(f"{op.name}({arguments}, str backend) -> {returns}", tags=_TAGS)
    _LIBRARY.impl(op.name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    if backward:
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)
    overload = getattr(torch.ops.difuse, op.name).default
    op.compiled = {backend: Compiled(overload, backend, results) for backend in op.backends if backend != "reference"}


def _missing(name, backend):
    """Why the op's backend is not installed, asked once per trace; imports the backend where it is."""
    from difuse_kernels.dispatch import OPS
    return OPS[name].missing(backend) or (OPS[name].implementation(backend) and None)


_missing._dynamo_marked_constant = True  # what assume_constant_result does, less 1.3 s of imports


def select(op, order, inputs):
    """The first of the backends in `order` that takes these (traced) inputs, or None."""
    for backend in order:
        if _missing(op.name, backend) is None and op.implementation(backend).unsupported(op.name, inputs) is None:
            return op.compiled.get(backend) or op.implementation(backend)
    return None


def running(op, backend, inputs):
    """The implementation that a compiled graph asks for, if it still takes these inputs."""
    implementation = op.implementation(backend)
    reason = op.refusal(backend, inputs)
    if reason is not None:  # the graph was traced on other inputs, or loaded on another machine
        raise RuntimeError(f"{op.name}: compiled for backend '{backend}', which now refuses: {reason}")
    op.chosen[backend, ()] += 1
    return implementation


def define(op, function, schema, fake, *, returns, results=1):
    """Register `op` and its backward from its autograd.Function.

    schema: the arguments of `function` after the implementation, tensors first: "Tensor x, Tensor? scale, str norm".
    fake(*arguments): what function.forward returns, empty: `returns` tensors, the first `results` of them the op's.
    """
    arguments = schema.split(", ")
    constants = [argument.split()[1] for argument in arguments if not argument.startswith("Tensor")]
    tensors = len(arguments) - len(constants)

    def run(*inputs):
        *inputs, backend = inputs
        return function.forward(running(op, backend, tuple(inputs[:tensors])), *inputs)

    def setup_context(ctx, inputs, output):
        *inputs, ctx.backend = inputs
        recorded = _Context()
        function.setup_context(recorded, (None, *inputs), output)
        ctx.save_for_backward(*recorded.saved_tensors)
        ctx.constants = inputs[tensors:]
        ctx.at = [next((i for i, saved in enumerate(recorded.saved_tensors) if saved is tensor), -1)
                  for tensor in inputs[:tensors]]
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        needs = [bool(need) for need in ctx.needs_input_grad[:tensors]]
        found = iter(backward_op(list(grads), list(ctx.saved_tensors), *ctx.constants, ctx.at, needs, ctx.backend))
        return *(next(found) if need else None for need in needs), *(None for _ in constants), None

    def run_backward(grads, saved, *rest):
        *values, _, needs, backend = rest
        ctx = _Context()
        vars(ctx).update(zip(constants, values, strict=True))
        ctx.implementation, ctx.saved_tensors = op.implementation(backend), tuple(saved)
        ctx.needs_input_grad = (False, *needs, *(False for _ in values))
        found = function.backward(ctx, *grads)[1 : 1 + tensors]
        return [_fresh(grad, grads) for grad, need in zip(found, needs, strict=True) if need]

    def fake_backward(grads, saved, *rest):
        *_, at, needs, _ = rest  # an input that was not saved is shaped like a result
        result = next(grad for grad in grads if grad is not None)
        return [like(result if i < 0 else saved[i]) for i, need in zip(at, needs, strict=True) if need]

    register(op, f"{schema} -> ({', '.join(['Tensor'] * returns)})", run, lambda *inputs: fake(*inputs[:-1]),
             results=results, backward=backward, setup_context=setup_context)
    rest = ", ".join(["", *arguments[tensors:], "int[] at, bool[] needs, str backend"])
    _LIBRARY.define(f"{op.name}_backward(Tensor?[] grads, Tensor?[] saved{rest}) -> Tensor[]", tags=_TAGS)
    _LIBRARY.impl(f"{op.name}_backward", run_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"difuse::{op.name}_backward", fake_backward, lib=_LIBRARY)
    backward_op = getattr(torch.ops.difuse, f"{op.name}_backward").default
