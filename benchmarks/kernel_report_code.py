"""What a compiler made of a kernel, read from its machine code: NVIDIA's SASS and AMD's amdgcn assembly.

Loops are found as natural loops of the control-flow graph (Aho, Lam, Sethi, Ullman, "Compilers", section 9.6): a plain
search for backward branches would take the waits on a barrier, which ptxas moves behind the program's end and which
branch back from there, for loops around everything.
"""
import math
import re
from collections import Counter
from typing import NamedTuple

SPIN = 8  # instructions: a loop up to this long that computes and moves nothing waits on a barrier


class Instruction(NamedTuple):
    """One machine instruction: `target` is the index it may jump to, `falls` whether the next one may follow it."""

    name: str
    target: int | None = None
    falls: bool = True


class Target(NamedTuple):
    """What bounds a kernel on one architecture, whose multiprocessor has 4 partitions of 512 registers per lane."""

    backend: str
    arch: object
    lanes: int  # threads of a warp
    warps: int  # per partition
    shared_per_block: int  # bytes
    shared: int  # bytes per multiprocessor
    reserved: int  # bytes of it per block, by the system


PARTITIONS, REGISTERS, STEP = 4, 512, 8  # a warp's registers per lane are rounded up to a multiple of STEP
BLOCKS = 32  # per multiprocessor
COLUMNS = 512  # of tensor memory per multiprocessor, where there is one
KB = 1024
TARGETS = {  # CUDA programming guide, "technical specifications per compute capability"; CDNA3 ISA guide, chapter 3
    "sm_80": Target("cuda", 80, 32, 16, 163 * KB, 164 * KB, KB),
    "sm_90": Target("cuda", 90, 32, 16, 227 * KB, 228 * KB, KB),
    "sm_100": Target("cuda", 100, 32, 16, 227 * KB, 228 * KB, KB),
    "gfx942": Target("hip", "gfx942", 64, 8, 64 * KB, 64 * KB, 0),
}

_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;")
_SASS_PREDICATE = re.compile(r"^@!?U?P(\d|T)\s+")
_GCN_LABEL = re.compile(r"^(\.?\w+):")
_MATRIX = re.compile(r"HGMMA|HMMA|QGMMA|UTC\w*MMA|v_s?mfma")
_SPECIAL = re.compile(r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_WORK = re.compile(r"\w*MMA|MUFU|[FH](ADD|MUL|FMA)|(LD|ST)[GS]|v_|buffer_|global_|flat_|ds_")
_GCN_MEMORY = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(dword|short|byte)(?:x(\d))?")
_GCN_BITS = {"dword": 32, "short": 16, "byte": 8}


def parse_sass(text):
    """The instructions in cuobjdump's disassembly of one kernel."""
    lines = [match.groups() for match in map(_SASS_LINE.match, text.splitlines()) if match]
    index = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    found = []
    for _, code in lines:
        bare = _SASS_PREDICATE.sub("", code)
        name, _, operands = bare.partition(" ")
        target, ends = None, name.startswith(("EXIT", "RET", "BRX", "JMX"))
        if name.startswith(("BRA", "JMP")):
            *condition, where = operands.rsplit(None, 1)
            target, ends = index[int(where.strip("`()"), 16)], not condition
        found.append(Instruction(name, target, not ends or bare != code))
    return found


def parse_gcn(text):
    """The instructions in the amdgcn assembly of one kernel."""
    lines, labels = [], {}
    for line in text.splitlines():
        line = line.split(";")[0].strip()
        if line.startswith(".Lfunc_end"):
            break
        if match := _GCN_LABEL.match(line):
            labels[match[1]] = len(lines)
        elif re.match(r"[a-z]+_\w", line):
            lines.append(line.split())
    return [Instruction(name, labels.get(operands[0]) if "branch" in name and operands else None,
                        name not in ("s_branch", "s_endpgm", "s_setpc_b64")) for name, *operands in lines]


def loops(instructions):
    """The natural loops, each a frozenset of instruction indices; those with one header are one loop."""
    if not instructions:
        return []
    starts = {0} | {i.target for i in instructions if i.target is not None}
    starts |= {n + 1 for n, i in enumerate(instructions[:-1]) if i.target is not None or not i.falls}
    starts = sorted(starts)
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(instructions)], strict=True)]
    number = {block[0]: n for n, block in enumerate(blocks)}
    successors = []
    for n, block in enumerate(blocks):
        last = instructions[block[-1]]
        following = [n + 1] if last.falls and n + 1 < len(blocks) else []
        successors.append(following + ([] if last.target is None else [number[last.target]]))
    predecessors = [[] for _ in blocks]
    for n, following in enumerate(successors):
        for m in following:
            predecessors[m].append(n)
    dominators = _dominators(successors, predecessors)
    bodies = {}
    for n in dominators:
        for header in dominators[n].intersection(successors[n]):
            bodies.setdefault(header, set()).update(_body(header, n, predecessors))
    return [frozenset(i for n in body for i in blocks[n]) for body in bodies.values()]


def _dominators(successors, predecessors):
    """{block that can be reached: the blocks on every path to it}."""
    order, stack = {0: None}, [0]
    while stack:
        fresh = [m for m in successors[stack.pop()] if m not in order]
        order.update(dict.fromkeys(fresh))
        stack += fresh
    dominators = {n: set(order) for n in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for n in list(order)[1:]:
            common = {n} | set.intersection(*(dominators[m] for m in predecessors[n] if m in order))
            if common != dominators[n]:
                dominators[n], changed = common, True
    return dominators


def _body(header, last, predecessors):
    body, stack = {header, last}, [last]
    while stack:
        n = stack.pop()
        fresh = set(predecessors[n]) - body if n != header else set()
        body |= fresh
        stack += fresh
    return body


def inner_loops(instructions):
    """[{instructions, matrix, special}] of the loops that matter, in the order of the code.

    These are the innermost loops that hold matrix instructions, or else the longest innermost loop; `special` counts
    exponentials, logarithms, reciprocals and roots. Waits on a barrier do not count as loops.
    """
    found = [body for body in loops(instructions)
             if len(body) > SPIN or any(_WORK.match(instructions[i].name) for i in body)]
    candidates = [body for body in found if _count(_MATRIX, instructions, body)] or found
    innermost = [body for body in candidates if not any(other < body for other in candidates)]
    if not any(_count(_MATRIX, instructions, body) for body in innermost):
        innermost = sorted(innermost, key=len)[-1:]
    return [{"instructions": len(body), "matrix": _count(_MATRIX, instructions, body),
             "special": _count(_SPECIAL, instructions, body)} for body in sorted(innermost, key=min)]


def _count(pattern, instructions, indices):
    return sum(bool(pattern.match(instructions[i].name)) for i in indices)


def summary(instructions):
    """What the code holds: matrix instructions by kind, global loads and stores by bits, local accesses, loops."""
    matrix, loads, stores, local = Counter(), Counter(), Counter(), Counter()
    for name in (i.name for i in instructions):
        if kind := _MATRIX.match(name):
            matrix[kind[0]] += 1
        parts = name.split(".")
        if parts[0] in ("LDG", "LDGSTS", "STG"):
            (stores if parts[0] == "STG" else loads)[_sass_bits(parts)] += 1
        elif parts[0] in ("UTMALDG", "UTMASTG", "UBLKCP"):
            (stores if parts[0] == "UTMASTG" else loads)["bulk"] += 1
        elif parts[0] in ("LDL", "STL") or name.startswith("scratch_"):
            local[parts[0] if parts[0] in ("LDL", "STL") else "scratch"] += 1
        elif access := _GCN_MEMORY.match(name):
            (loads if access[1] == "load" else stores)[_GCN_BITS[access[2]] * int(access[3] or 1)] += 1
    return {"instructions": sum(name != "NOP" for name in (i.name for i in instructions)), "matrix": dict(matrix),
            "loads": _by_bits(loads), "stores": _by_bits(stores), "local": dict(local),
            "loops": inner_loops(instructions)}


def _sass_bits(parts):
    widths = [p for p in parts[1:] if p in ("64", "128", "256") or re.fullmatch("[US](8|16)", p)]
    return int(widths[0].lstrip("US")) if widths else 32


def _by_bits(counter):
    return {str(bits): counter[bits] for bits in sorted(counter, key=str)}


def parse_usage(text):
    """{registers, stack} from cuobjdump -res-usage of one kernel."""
    values = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(values["REG"]), "stack": int(values["STACK"]) + int(values["LOCAL"])}


def parse_gcn_metadata(text):
    """{registers, agpr, sgpr, stack, vgpr_spills, sgpr_spills} from the metadata at the assembly's end.

    `registers` counts both kinds of vector register, which share one file on this architecture.
    """
    def value(name):
        return int(re.search(rf"^\s*-?\s*\.{name}:\s*(\d+)", text, re.MULTILINE)[1])

    return {"registers": value("vgpr_count"), "agpr": value("agpr_count"), "sgpr": value("sgpr_count"),
            "stack": value("private_segment_fixed_size"), "vgpr_spills": value("vgpr_spill_count"),
            "sgpr_spills": value("sgpr_spill_count")}


def occupancy(target, registers, shared, num_warps, columns=0):
    """Blocks per multiprocessor that registers, shared memory, warps and tensor memory allow; 0 where not one fits."""
    limits = TARGETS[target]
    warps = PARTITIONS * min(limits.warps, REGISTERS // (max(1, math.ceil(registers / STEP)) * STEP))
    return min(BLOCKS, warps // num_warps, limits.shared // (shared + limits.reserved or 1),
               COLUMNS // columns if columns else BLOCKS)
