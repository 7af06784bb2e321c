"""`python -m difuse_kernels`: which op runs on which backend here, and why not."""
import platform

import torch

import difuse_kernels  # noqa: F401  defines the ops
from difuse_kernels import native
from difuse_kernels.dispatch import BACKENDS, OPS


def support_table():
    """The table as text: a row per op, a column per backend ("yes" or a number), then the numbered reasons."""
    reasons = []
    rows = [("op", *BACKENDS)]
    for op in OPS.values():
        cells = []
        for backend in BACKENDS:
            reason = op.missing(backend)
            if reason is None:
                cells.append("yes")
                continue
            if reason not in reasons:
                reasons.append(reason)
            cells.append(f"no [{reasons.index(reason) + 1}]")
        rows.append((op.name, *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"[{i}] {reason}" for i, reason in enumerate(reasons, 1)])


def main():
    """Print the table under a line that names the versions."""
    isa = "none" if native.ext is None else native.ext.isa()
    print(f"torch {torch.__version__}, native module {isa}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads")
    print(support_table())


if __name__ == "__main__":
    main()
