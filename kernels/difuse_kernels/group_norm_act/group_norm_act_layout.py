"""The two memory formats of an image [B,C,*spatial] that the kernels of group_norm_act take."""

NOT_DENSE = "x is neither contiguous nor channels_last; call .contiguous() on it"


def channels_last(x):
    """Whether x lies in memory as [B,*spatial,C] and not as [B,C,*spatial]; None if as neither."""
    if x.is_contiguous():
        return False
    return True if x.movedim(1, -1).is_contiguous() else None


def memory(x):
    """x as it lies in memory, [B,*spatial,C] or [B,C,*spatial]: contiguous, if x is dense."""
    return x.movedim(1, -1) if channels_last(x) else x


def image_like(x, empty):
    """An uninitialised tensor of x's shape and memory format; `empty` makes contiguous ones of a shape."""
    if not channels_last(x):
        return empty(x.shape)
    B, C, *spatial = x.shape
    return empty((B, *spatial, C)).movedim(-1, 1)


def in_format_of(x, grad):
    """An incoming gradient, brought into x's memory format if it lies otherwise."""
    if not channels_last(x):
        return grad.contiguous()
    return grad if channels_last(grad) else grad.movedim(1, -1).contiguous().movedim(-1, 1)
