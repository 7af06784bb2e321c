"""The kernel report: what it reads from machine code, what it calls an offence, and that it sees Triton's own compile.

Here Triton interprets (conftest.py), so whatever compiles does so in a process of its own.
"""
import json
import os
import pathlib
import pickle
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernel_report, kernel_report_cases, kernel_report_text
from benchmarks.kernel_report_code import (
    TARGETS,
    loops,
    occupancy,
    parse_gcn,
    parse_gcn_metadata,
    parse_sass,
    parse_usage,
    summary,
)
from benchmarks.kernel_report_compile import Job, Pointer, dot_types
from difuse_kernels import triton_launch
from difuse_kernels.dispatch import OPS

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[1]

# Two loops: one with matrix instructions that waits, out of line, on a barrier; then one without. Then a self-loop.
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00 */
                                                                      /* 0x01 */
        /*0010*/              @!P0 BRA 0xe0 ;                         /* 0x00 */
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64], P0 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR25], R14 ;
        /*0040*/              @!P4 BRA 0x140 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8].tnspB, R24 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R36.reuse, R2, R4 ;
        /*0070*/                   MUFU.EX2 R4, R5 ;
        /*0080*/                   STL.64 [R1+0x8], R4 ;
        /*0090*/               @P0 BRA 0x20 ;
        /*00a0*/                   LDG.E.U16.CONSTANT R3, desc[UR4][R2.64] ;
        /*00b0*/                   FADD R3, R3, R4 ;
        /*00c0*/                   LDL R4, [R1] ;
        /*00d0*/                   BRA.U UP0, 0xa0 ;
        /*00e0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00f0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0100*/              @!P0 EXIT ;
        /*0110*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR10], tmem[UR18], idesc[UR19], !UPT ;
        /*0120*/                   EXIT ;
        /*0130*/                   BRA 0x130;
        /*0140*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR25], R14 ;
        /*0150*/              @!P4 BRA 0x140 ;
        /*0160*/                   BRA 0x50 ;
        /*0170*/                   NOP;
"""

GCN = """
	.text
kernel:                                 ; @kernel
; %bb.0:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	global_load_dwordx4 v[0:3], v4, s[0:1]
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Loop Header: Depth=1
	buffer_load_dwordx2 v[2:3], v16, s[0:3], 0 offen
	v_mov_b32_e32 v1, v2
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[48:49], v[32:33], a[0:15]
	v_exp_f32_e32 v19, v17
	s_cbranch_scc0 .LBB0_2
; %bb.4:
	buffer_load_ushort v34, v32, s[16:19], 0 offen
	s_cbranch_scc1 .LBB0_1
.LBB0_3:
	global_store_short_d16_hi v34, v32, s[16:17]
	scratch_store_dword off, v1, s33
	s_endpgm
.Lfunc_end0:
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[48:49], v[32:33], a[0:15]
amdhsa.kernels:
  - .agpr_count:     16
    .private_segment_fixed_size: 20
    .sgpr_count:     26
    .sgpr_spill_count: 1
    .vgpr_count:     84
    .vgpr_spill_count: 5
"""


def test_sass_is_counted():
    found = summary(parse_sass(SASS))
    assert found["matrix"] == {"HGMMA": 1, "HMMA": 1, "UTCHMMA": 1}
    assert found["loads"] == {"128": 1, "16": 1} and found["stores"] == {"32": 1, "64": 1}
    assert found["local"] == {"STL": 1, "LDL": 1}
    assert found["instructions"] == 23
    assert found["loops"] == [{"instructions": 11, "matrix": 2, "special": 1}]  # 3 of them wait


def test_waits_behind_the_end_of_the_program_are_no_loops_around_it():
    found = sorted(sorted(body) for body in loops(parse_sass(SASS)))
    assert found == [[2, 3, 4, 5, 6, 7, 8, 9, 20, 21, 22], [10, 11, 12, 13], [20, 21]]


def test_gcn_is_counted_up_to_the_end_of_the_function():
    found = summary(parse_gcn(GCN))
    assert found["matrix"] == {"v_mfma": 1} and found["local"] == {"scratch": 1}
    assert found["loads"] == {"128": 1, "16": 1, "64": 1} and found["stores"] == {"16": 1}
    assert found["loops"] == [{"instructions": 3, "matrix": 1, "special": 1}]
    assert parse_gcn_metadata(GCN) == {"registers": 84, "agpr": 16, "sgpr": 26, "stack": 20, "vgpr_spills": 5,
                                       "sgpr_spills": 1}


def test_all_matrix_loops_are_told_or_else_the_longest():
    loop = "/*{:04x}*/ {} ;\n/*{:04x}*/ FADD R1, R1, R2 ;\n/*{:04x}*/ @P0 BRA 0x{:x} ;\n"

    def code(*names):
        return "".join(loop.format(48 * n, name, 48 * n + 16, 48 * n + 32, 48 * n) for n, name in enumerate(names))

    def told(*names):
        return [(found["instructions"], found["matrix"]) for found in summary(parse_sass(code(*names)))["loops"]]

    assert told("HMMA R1", "FADD R1", "HGMMA R1") == [(3, 1), (3, 1)]
    assert told("FADD R1", "MUFU.EX2 R1") == [(3, 0)]


def test_code_without_loops():
    assert summary(parse_sass("/*0000*/ LDC R1, c[0x0][0x28] ;\n/*0010*/ EXIT ;\n/*0020*/ BRA 0x20;"))["loops"] == []
    assert summary([])["loops"] == []


def test_resource_usage():
    text = " Function toy:\n  REG:64 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    assert parse_usage(text) == {"registers": 64, "stack": 24}


@pytest.mark.parametrize(("target", "registers", "shared", "warps", "blocks"), [
    ("sm_90", 128, 0, 4, 4),  # 512 warps' registers of 128 lanes: 16 warps
    ("sm_90", 129, 0, 4, 3),  # rounded up to 136
    ("sm_90", 32, 0, 4, 16), ("sm_90", 16, 0, 1, 32),  # warps; blocks
    ("sm_90", 64, 113 * 1024, 4, 2), ("sm_90", 64, 114 * 1024, 4, 1), ("sm_80", 64, 164 * 1024, 4, 0),
    ("sm_90", 255, 0, 16, 0),  # what does not fit
    ("gfx942", 128, 0, 4, 4), ("gfx942", 512, 0, 4, 1), ("gfx942", 32, 32 * 1024, 4, 2),
])
def test_occupancy(target, registers, shared, warps, blocks):
    assert occupancy(target, registers, shared, warps) == blocks


def test_tensor_memory_bounds_occupancy():
    assert [occupancy("sm_100", 32, 0, 4, columns) for columns in (0, 64, 256, 512, 1024)] == [16, 8, 2, 1, 0]


def test_dot_types():
    line = "%acc = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<64x64x{}> * tensor<64x32x{}> -> tensor<64x32xf32>"
    assert dot_types("\n".join([line.format("bf16", "bf16"), "tt.load", line.format("f32", "f32")])) == {"bf16", "f32"}
    assert dot_types("tt.dot_scaled") == set()


def test_pointers_know_alignment_and_reach():
    x = torch.empty(4, 3, 24, device="meta", dtype=torch.bfloat16)
    assert [Pointer.to(t).data_ptr() for t in (x, x[:, 1], x[..., 8:], x[..., 9:])] == [0, 0, 0, 2]
    assert Pointer.to(x[1]).ptr_range() == x.numel() * 2


def test_jobs_hold_no_tensors():
    x = torch.empty(8, device="meta", requires_grad=True)
    launch = triton_launch.Launch(SimpleNamespace(fn=loops), (1,), ((x, (x[1:], None)), 3), {"BLOCK": 16})
    aligned, other = Pointer(torch.float32, 0, 32), Pointer(torch.float32, 4, 32)
    assert pickle.loads(pickle.dumps(Job.of(launch, "sm_90"))) == Job(
        "sm_90", loops.__module__, "loops", ((aligned, (other, None)), 3), (("BLOCK", 16),))


def row(**changes):
    return {"op": "attention", "kernel": "forward_kernel", "target": "sm_90", "registers": 168, "stack": 0, "local": {},
            "shared": 8192, "num_warps": 4, "tensor_memory_columns": 0, "blocks_per_sm": 3, "dots": ["bf16"],
            "matrix": {"HGMMA": 8}, "loads": {"128": 4}, "stores": {}, "loops": [], "constants": {},
            "used_by": [{"pass": "P", "grid": [64]}]} | changes


def a_pass(op="attention", dtype="bf16", name="P"):
    return {name: {"op": op, "case": "DiT", "dtype": dtype, "pass": "forward", "bytes": 1e9, "flops": 1e12,
                   "predicted_seconds": 1e-3, "bound": "flops"}}


@pytest.mark.parametrize(("changes", "passes", "said"), [
    ({}, a_pass(), None),
    ({"stack": 8}, a_pass(), "spills: 8 B stack"),
    ({"local": {"STL": 2, "LDL": 3}}, a_pass(), "spills: 2 STL, 3 LDL"),
    ({"target": "gfx942", "vgpr_spills": 4, "shared": 0}, a_pass(), "spills: 4 VGPR"),
    ({"target": "gfx942", "sgpr_spills": 4}, a_pass(), None),  # into vector registers, not to memory
    ({"shared": 228 * 1024}, a_pass(), "233472 bytes of shared memory; a block gets 232448"),
    ({"shared": 200 * 1024, "target": "sm_80"}, a_pass(), "a block gets 166912"),
    ({"shared": 65537, "target": "gfx942"}, a_pass(), "a block gets 65536"),
    ({"blocks_per_sm": 0, "registers": 255, "num_warps": 16}, a_pass(), "does not fit: 255 registers in 16 warps"),
    ({"matrix": {}}, a_pass(), "lost its tensor cores: products of bf16, 0 matrix instructions"),
    ({"dots": ["bf16", "f32"]}, a_pass(), "lost its tensor cores: products of bf16, f32"),
    ({"dots": [], "matrix": {}}, a_pass(), "no kernel of (P) uses tensor cores on sm_90"),
    ({"dots": ["f32"], "matrix": {}}, a_pass(dtype="fp32"), None),  # IEEE products
    ({"dots": [], "matrix": {}}, a_pass(op="norm_modulate"), None),
    ({"used_by": [{"pass": "P", "grid": [1 << 20, 65536]}]}, a_pass(), "cannot be launched: grid [1048576, 65536]"),
    ({"failed": "RuntimeError: no"}, a_pass(), "does not compile: RuntimeError: no"),
])
def test_offenders(changes, passes, said):
    found = kernel_report.offenders([row(**changes)], passes)
    assert len(found) == (said is not None)
    assert said is None or (said in found[0] and changes.get("target", "sm_90") in found[0])


def test_a_pass_needs_only_one_matrix_kernel_on_each_target():
    delta = row(kernel="delta", dots=[], matrix={})
    assert kernel_report.offenders([row(), delta], a_pass()) == []
    assert len(kernel_report.offenders([row(), delta, row(kernel="delta", target="sm_80", dots=[])], a_pass())) == 1


def test_reports_are_written(tmp_path):
    rows = [row(), row(target="gfx942", agpr=16, vgpr_spills=1), row(failed="RuntimeError: no") | {"kernel": "broken"}]
    report = {"environment": dict.fromkeys(("triton", "torch", "difuse", "commit", "command"), "1"),
              "ceilings": {"bytes_per_second": 4.3e12, "flops_per_second": {"bf16": 780e12}}, "cpu_seconds": 7,
              "not_written": ["new_op"], "offenders": ["it spills"], "passes": a_pass(), "kernels": rows}
    kernel_report_text.write(tmp_path / "new", report)
    assert json.loads((tmp_path / "new" / "kernel-report.json").read_text()) == json.loads(json.dumps(report))
    markdown = (tmp_path / "new" / "kernel-report.md").read_text()
    assert "- it spills" in markdown and "new_op" in markdown and "does not compile" in markdown
    assert "168 (16a)" in kernel_report_text.terminal(report)


def test_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(triton_launch, "INTERPRETED", True)
    assert kernel_report.main(["--quick"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_unknown_names_are_refused():
    for arguments in (["--op", "nothing"], ["--target", "sm_70"], ["--jobs", "0"]):
        with pytest.raises(SystemExit):
            kernel_report.parse(arguments)


def test_parts_of_the_report_do_not_overwrite_the_whole():
    assert kernel_report.parse([]).out == kernel_report.RESULTS
    assert kernel_report.parse(["--quick"]).out is None and kernel_report.parse(["--target", "sm_90"]).out is None


def test_every_op_with_triton_kernels_is_reported():
    assert {call.op for call in kernel_report_cases.CALLS} >= set(kernel_report_cases.written())
    assert {call.op for call in kernel_report_cases.CALLS} <= set(OPS)


@pytest.mark.parametrize("target", TARGETS)
def test_quick_calls_launch_every_kernel(target):
    launched = {True: set(), False: set()}
    for call in kernel_report_cases.CALLS:
        if call.op in kernel_report_cases.written():
            recorded = kernel_report_cases.Recorded(call, target, quick=call.quick)
            launched[call.quick] |= {(OPS[call.op].stem, launch.kernel.fn.__name__)
                                     for launches in recorded.launches.values() for launch in launches}
    assert launched[False] - launched[True] == set()


def test_a_refused_production_call_is_an_error(monkeypatch):
    call = next(call for call in kernel_report_cases.CALLS if call.op == "norm_modulate")
    monkeypatch.setattr(OPS["norm_modulate"].implementation("triton"), "unsupported", lambda _op, _inputs: "too wide")
    with pytest.raises(RuntimeError, match="refuse a production call: too wide"):
        kernel_report_cases.Recorded(call, "sm_90")


def test_predictions_count_each_tensor_once():
    call = next(call for call in kernel_report_cases.CALLS if call.op == "gate_residual")
    recorded = kernel_report_cases.Recorded(call, "sm_90")
    elements, gate = 64 * 256 * 384, 64 * 384
    found = {which: kernel_report.prediction(call, recorded, which) for which in ("forward", "backward")}
    assert found["forward"]["bytes"] == 2 * (3 * elements + gate)
    assert found["backward"]["bytes"] == 2 * (3 * elements + 2 * gate)
    assert found["forward"]["bound"] == "bytes"
    assert found["forward"]["predicted_seconds"] == pytest.approx(found["forward"]["bytes"] / 4.3e12)


PLANTED = '''
import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, out, stride, OFF: tl.constexpr, WIDEN: tl.constexpr, PIECES: tl.constexpr):
    """Spills where PIECES are many: all are alive together. WIDEN takes the product off the tensor cores."""
    i = tl.arange(0, 64)
    at = i[:, None] * stride + i[None, :]
    x, y = tl.load(a + at), tl.load(b + at + OFF)
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    z = tl.dot(x, y, input_precision="ieee")
    pieces = ()
    for k in tl.static_range(PIECES):
        pieces = pieces + (tl.load(a + at + k * 4096).to(tl.float32), )
    tl.debug_barrier()
    for k in tl.static_range(PIECES):
        z = z * pieces[PIECES - 1 - k] + pieces[k]
    tl.store(out + at, z)
'''

RUN = '''
import json
import torch
from benchmarks import kernel_report
from benchmarks.kernel_report_compile import Job, Pointer, compile_all, specialisation
from difuse_kernels.triton_launch import Launch
import planted

if __name__ == "__main__":
    x = torch.empty(1 << 20, device="meta", dtype=torch.bfloat16)
    def launch(*options, **constants):
        return Launch(planted.product, (1,), (x, x[1:], x, 64), dict(OFF=0, num_warps=4, num_stages=1) | constants)
    launches = [launch(WIDEN=False, PIECES=1), launch(WIDEN=True, PIECES=1), launch(WIDEN=False, PIECES=24),
                launch(WIDEN=False, PIECES="many")]
    jobs = [Job.of(one, "sm_90") for one in launches] + [Job.of(launches[0], "gfx942")]
    passes = {str(n): dict(op="attention", dtype="bf16") for n in range(len(jobs))}
    rows = [dict(op="attention", kernel="product", target=job.target, used_by=[{"pass": str(n), "grid": [1]}]) | found
            for n, (job, found) in enumerate(zip(jobs, compile_all(jobs, 2, lambda futures, total: futures)))]
    own = torch.empty(1 << 20, dtype=torch.bfloat16)
    real = Job("sm_90", "planted", "product", (own, own[1:], own, 64), jobs[0].constants)
    said = [[], [], [], [], []]
    for row, n in zip(rows, range(5)):
        said[n] = kernel_report.offenders([row], {str(n): passes[str(n)]})
    print(json.dumps({"rows": rows, "said": said, "same": specialisation(real) == specialisation(jobs[0]),
                      "key": specialisation(jobs[0])}))
'''


@pytest.mark.slow
def test_planted_kernels_are_caught(tmp_path):
    """Compiled in a process without the interpreter: a sound kernel passes, a spilling one and a widened one do not."""
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "run.py").write_text(RUN)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, tmp_path / "run.py"], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, textwrap.indent(done.stderr, "    ")
    found = json.loads(done.stdout)
    sound, widened, spilling, broken, amd = found["rows"]
    assert sound["matrix"] and sound["dots"] == ["bf16"] and found["said"][0] == found["said"][4] == []
    assert amd["matrix"] == {"v_mfma": amd["matrix"]["v_mfma"]} and 0 < amd["registers"] <= 512
    assert not widened["matrix"] and "lost its tensor cores: products of f32" in found["said"][1][-1]
    assert spilling["local"]["STL"] > 0 and "spills" in found["said"][2][0]
    assert "does not compile" in found["said"][3][0]
    assert found["same"]  # a recorded meta tensor and a real one of the same layout are the same to Triton
    assert "('*bf16', '')" in found["key"]  # x[1:] is not aligned
