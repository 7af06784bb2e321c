"""`python -m benchmarks.cuda_report [--check]`: what nvcc made of the CUDA C++ kernels, read from the built module.

No GPU is needed. For every kernel and architecture: registers, blocks of 128 threads per multiprocessor, static shared
memory, instructions, and global loads and stores by their width in bits. --check fails on a spill, on an array in
local memory, on a wide kernel without 128-bit loads and stores, and where an op or an architecture is missing.
"""
import argparse
import pathlib
import re
import shutil
import subprocess
import sys
from collections import defaultdict

import difuse_kernels
from benchmarks import kernel_report_code as code

ROOT = pathlib.Path(__file__).parents[1]
OPS = sorted({path.parent.name for path in (ROOT / "csrc").glob("*/*_cuda.cu")} - {"common"})
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
FEW_RESULTS = ("row_means_kernel",)  # read rows, write a number or two for each
_FUNCTION = re.compile(r"^\s*Function ?:? ?(\S+?):?\s*$")
_ARCH = re.compile(r"^arch = (\S+)")
_SOURCE = re.compile(r"_GLOBAL__N__\w*?_\d+_(\w+?)_cuda_cu_")


def module():
    """The built module's file, or None."""
    found = sorted(pathlib.Path(difuse_kernels.__file__).parent.glob("_native_cuda*.so"))
    return found[0] if found else None


def cuobjdump(option, path):
    """The tool's output; it comes with CUDA, and with Triton."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton
        tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def sections(text):
    """{(architecture, mangled kernel): its lines} of cuobjdump's output."""
    found, arch, lines = {}, None, []
    for line in text.splitlines():
        if match := _ARCH.match(line):
            arch = match[1]
        elif match := _FUNCTION.match(line):
            lines = found[arch, match[1]] = []
        else:
            lines.append(line)
    return {key: "\n".join(lines) for key, lines in found.items()}


def short_names(mangled):
    """{mangled name: what the source calls it, with its template arguments}."""
    if shutil.which("c++filt") is None:
        return {name: name for name in mangled}
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = {}
    for name, full in zip(mangled, text.splitlines(), strict=True):
        full = re.sub(r"\(anonymous namespace\)::|difuse::cuda::|^void ", "", full)
        full = re.sub(r"\((bool|int|long)\)", "", full.replace("__nv_bfloat16", "bf16").replace("__half", "f16"))
        names[name] = re.split(r"\((?!\w*\))", full)[0]
    return names


def kernels(path):
    """One dict per kernel and architecture: op, name, arch and what the machine code holds."""
    usage, listings = sections(cuobjdump("-res-usage", path)), sections(cuobjdump("-sass", path))
    names = short_names(sorted({name for _, name in listings}))
    found = []
    for (arch, name), listing in sorted(listings.items(), key=lambda item: item[0]):
        resources = usage[arch, name]
        instructions = code.parse_sass(listing)
        row = code.parse_usage(resources) | code.summary(instructions)
        row |= {key: sum(i.name.startswith(key) for i in instructions) for key in ("LDS", "STS")}
        shared = int(re.search(r"SHARED:(\d+)", resources)[1])
        source = _SOURCE.search(name)
        found.append({"op": source[1] if source else "?", "name": names[name], "arch": arch, "shared": shared, **row})
    return found


def wide(row):
    """Whether a kernel moves 16 bytes at a time both ways."""
    return "128" in row["loads"] and "128" in row["stores"]


def problems(rows):
    """What --check fails on, one line each."""
    lines = []
    for row in rows:
        if row["stack"] or row["local"]:
            lines.append(f"{row['op']} {row['name']} on {row['arch']}: {row['stack']} bytes of local memory, accesses "
                         f"{row['local'] or 'none'}")
        if row["LDS"] and not row["STS"]:
            lines.append(f"{row['op']} {row['name']} on {row['arch']}: reads shared memory and never writes it")
        narrow = row["stores"] and "128" not in row["stores"]
        if narrow and "128" in row["loads"] and not row["name"].startswith(FEW_RESULTS):
            lines.append(f"{row['op']} {row['name']} on {row['arch']}: loads 128 bits, stores {row['stores']}")
    by_op = defaultdict(set)
    for row in rows:
        if wide(row):
            by_op[row["op"].removesuffix("_backward")].add(row["arch"])
    for op in OPS:
        for arch in ARCHITECTURES:
            if arch not in by_op[op]:
                lines.append(f"{op} on {arch}: no kernel with 128-bit loads and stores")
    return lines


def table(rows):
    """One line per kernel and architecture."""
    def widths(found):
        return " ".join(f"{count}x{bits}" for bits, count in found.items()) or "-"

    lines = [("op", "kernel", "arch", "registers", "blocks", "shared", "instructions", "loads", "stores")]
    for row in rows:
        target = "sm_90" if row["arch"] == "sm_90a" else row["arch"]
        lines.append((row["op"], row["name"], row["arch"], str(row["registers"]),
                      str(code.occupancy(target, row["registers"], row["shared"], 4)), str(row["shared"]),
                      str(row["instructions"]), widths(row["loads"]), widths(row["stores"])))
    columns = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, columns, strict=True)).rstrip() for line in lines)


def main(argv=None):
    """Print the table; with --check return 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_report", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail on spills and on lost wide accesses")
    check = parser.parse_args(argv).check
    path = module()
    if path is None:
        print("the CUDA C++ kernels are not built here, for want of nvcc; install CUDA 13 and run `make native`")
        return 0
    rows = kernels(path)
    print(table(rows))
    found = problems(rows) if check else []
    for line in found:
        print(f"FAILED  {line}")
    if check and not found:
        print(f"{len(rows)} kernels: no spills, 128-bit accesses in every op on {', '.join(ARCHITECTURES)}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
