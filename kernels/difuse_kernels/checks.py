"""Input checks and small parts shared by the op contracts. A check says what was got, what was expected, what to do."""
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(op, name, value, shape_text, ndim):
    """`value` is a floating tensor with `ndim` dimensions (an int or a tuple of ints)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}; expected a tensor {shape_text}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {value.dtype}; expected a floating dtype. Convert it with .float()")
    if value.dim() != ndim if isinstance(ndim, int) else value.dim() not in ndim:
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; expected {shape_text}")


def check_shape(op, name, value, *shapes):
    """`value` (a tensor or None) has one of `shapes` and a floating dtype."""
    if value is None or (isinstance(value, torch.Tensor) and value.shape in shapes and value.dtype in FLOATS):
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}; expected a tensor or None")
    if value.shape not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; expected {expected}")
    raise TypeError(f"{op}: {name} has dtype {value.dtype}; expected a floating dtype. Convert it with .float()")


def check_one_of(op, name, value, allowed):
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def check_same_device(op, tensors):
    """All tensors (None allowed) live on one device."""
    device = tensors[0].device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: inputs are on {device} and {tensor.device}; move them to one device with .to()")


def needs_grad(*tensors):
    """Whether autograd must record this call."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110  a generator costs 0.3 us more, on every call of every op
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def apply(function, *arguments):
    """function.apply(*arguments), all of them given, for an autograd.Function.

    torch inspects the signature at every call to fill in defaults: 83 us against 22 us without it. What else it does
    is for torch.func's transforms, under which dispatch takes the reference.
    """
    return super(torch.autograd.Function, function).apply(*arguments)


KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def why_not_dense(inputs):
    """What native kernels refuse in any op, on any device: another dtype, a strided last dimension."""
    for position, tensor in enumerate(inputs):
        if tensor is None or (tensor.dtype in KERNEL_DTYPES and (tensor.is_contiguous() or tensor.stride()[-1] == 1)):
            continue
        if tensor.dtype not in KERNEL_DTYPES:
            return f"input {position} has dtype {tensor.dtype}; the kernels take float32, bfloat16 and float16"
        if tensor.shape[-1] > 1:
            return f"the last dimension of input {position} is strided; call .contiguous() on it"
    return None


def any_strides(inputs):
    """What to ask `unsupported` where strides are free: a strided last dimension is as good as its first column."""
    return [x if x.stride(-1) == 1 else x[..., :1] for x in inputs]


def dense_last(grad):
    """An incoming gradient with a contiguous last dimension (autograd hands over expanded and transposed ones)."""
    return grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()
