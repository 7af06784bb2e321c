"""What the contracts of adaln check of their arguments."""
from difuse_kernels.checks import check_one_of, check_shape, check_tensor


def check_stream(op, x, y):
    """x and y are [B,S,D]."""
    check_tensor(op, "x", x, "[B,S,D]", 3)
    check_tensor(op, "y", y, "[B,S,D]", 3)
    check_shape(op, "y", y, x.shape)


def check_modulation(op, x, **modulations):
    """Each is None, [B,D] or [B,S,D]."""
    per_token = x.shape
    per_sample = (per_token[0], per_token[2])
    for name, value in modulations.items():
        if value is not None:
            check_shape(op, name, value, per_sample, per_token)


def check_tables(op, x, **tables):
    """Of each pair of a modulation and its table the table is None, or [D] beside a modulation."""
    for name, (modulation, table) in tables.items():
        check_shape(op, f"{name}_table", table, x.shape[2:])
        if table is not None and modulation is None:
            raise ValueError(f"{op}: {name}_table is given but {name} is None; pass the {name} that the table is added "
                             f"to, or the table alone as {name}, expanded to [B,D]")


def check_norm(op, x, norm, weight=None, bias=None):
    """norm is "layer" or "rms"; weight and bias are None or [D]."""
    check_one_of(op, "norm", norm, ("layer", "rms"))
    if weight is not None or bias is not None:
        check_shape(op, "weight", weight, x.shape[2:])
        check_shape(op, "bias", bias, x.shape[2:])
