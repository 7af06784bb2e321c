"""Mends Triton's interpreter, as of 3.6 to 3.9, so that bfloat16 behaves as on a GPU and loops run.

It truncates float32 to bfloat16 where GPUs round to nearest even, and multiplies the bit patterns of bfloat16 operands
in a dot. What a masked load without `other` leaves undefined it reads as zero; here it is nan, so that nobody relies on
it. 3.6 with NumPy 2.4 fails on a loop bound that is not a constant. After a launch it copies every storage onto itself
where tensors are on the CPU, all of it, which for a view of a huge tensor is gigabytes.
"""
import contextlib

import numpy as np


def _widen(bits):
    """bfloat16 bit patterns (uint16) to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values):
    """float32 to the bit patterns of the nearest bfloat16, ties to even; a nan stays a quiet nan."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def mend():
    """Patch the interpreter of this process. Calling it again changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "mended", False):
        return
    builder.mended = True
    cast, to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = handle(_widen(src.data), tl.float32)
            return wide if target == tl.float32 else cast(self, wide, dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return handle(_round(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, *rest):
        a, b = (handle(_widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    restore = interpreter.GridExecutor._restore_args_dev

    def restore_args_dev(self, args_dev, args_hst, kwargs, kwargs_hst):
        tensors = [a for a in args_dev if hasattr(a, "is_cpu")]
        if not all(tensor.is_cpu for tensor in tensors):
            restore(self, args_dev, args_hst, kwargs, kwargs_hst)

    masked_load, patch = builder.create_masked_load, interpreter._patch_lang_tensor

    def create_masked_load(self, ptrs, mask, other, *rest, **keywords):
        element = ptrs.get_element_ty()
        if other is None and element.is_floating():
            value = 0x7FC0 if element == tl.bfloat16 else np.nan
            other = handle(np.full_like(ptrs.data, value, dtype=interpreter._get_np_dtype(element)), element)
        return masked_load(self, ptrs, mask, other, *rest, **keywords)

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    builder.create_masked_load = create_masked_load
    interpreter.GridExecutor._restore_args_dev = restore_args_dev


@contextlib.contextmanager
def programs_backwards():
    """Inside the block the programs of a grid run last to first: a result that changes depends on their order."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    forwards = builder.set_grid_idx

    def set_grid_idx(self, *index):
        forwards(self, *(size - 1 - i for size, i in zip(self.grid_dim, index, strict=True)))

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_idx = forwards
