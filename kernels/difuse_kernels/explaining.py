"""What ran where, counted by dispatch.py at every call."""
from difuse_kernels.dispatch import OPS


def explain():
    """What ran where since the process began (or `explain_reset`): one line per op, backend and set of refusals."""
    lines = []
    for op in OPS.values():
        for (backend, refusals), calls in op.chosen.items():
            why = "".join(f"; not {name}: {reason}" for name, reason in refusals)
            lines.append(f"{op.name:28} {backend:10} {calls:>9} calls{why}")
    return "\n".join(lines) or "no op has run yet"


def explain_reset():
    """Forget the calls counted for `explain`."""
    for op in OPS.values():
        op.chosen.clear()
