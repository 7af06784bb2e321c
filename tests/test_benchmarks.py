"""The benchmarks: their gate, their arithmetic, their files. Tiny cases; no speed is judged here."""
import gc
import json
import re
import time

import pytest
import torch

import difuse
import difuse_kernels
from benchmarks import bench_engine, bench_frozen, bench_model, bench_ops, bench_train, rivals, roofline, run, timing
from difuse.models import DiT
from difuse_kernels import dit_block
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.case import Case
from difuse_kernels.testing.cases import cases

CEILINGS = {"buffer_bytes": 1 << 20, "copy_bytes_per_second": 1e10, "clone_bytes_per_second": 1e9,
            "gemm_fp32_flops_per_second": 1e11, "gemm_bf16_flops_per_second": 1e10}


def tiny(op, name):
    return next(case for case in cases(op) if case.name == name)


TINY = [tiny(op, name) for op, name in (
    ("norm_modulate", "per_token"), ("norm_modulate_dual", "odd"), ("gate_residual", "odd"),
    ("gate_residual_norm_modulate", "affine"), ("attention", "dit_s"), ("attention_packed", "lengths_bias"),
    ("gated_activation", "odd"), ("gelu_tanh", "odd"), ("gram", "odd"), ("group_norm_act", "odd"),
    ("qk_norm_rope", "odd"), ("qk_norm_rope_joint", "gradcheck"), ("patchify", "gradcheck"),
    ("unpatchify", "gradcheck"), ("sampler_step", "ddim_cfg"))]


@pytest.fixture(autouse=True)
def tiny_ceilings_and_short_runs(monkeypatch):
    monkeypatch.setattr(timing, "LEAST", 1e-5)
    monkeypatch.setattr(roofline, "BUFFER", 1 << 20)
    monkeypatch.setattr(roofline, "last_level_cache", lambda: 1 << 18)
    monkeypatch.setattr(roofline, "GEMM_SIZE", dict.fromkeys(roofline.GEMM_SIZE, 32))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads wait for each other, up to 20 ms per call
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_cases(monkeypatch):
    monkeypatch.setattr(bench_ops, "cases", lambda op, speed: [case for case in TINY if case.op == op])
    monkeypatch.setattr(bench_ops, "ONE_ROW", bench_ops.ONE_ROW[:1])
    monkeypatch.setattr(bench_model, "FAMILIES", {"DiT-tiny": TinyDiT})
    monkeypatch.setattr(bench_frozen, "CASES", (("DiT-tiny", 2),))


class TinyDiT(DiT):
    @classmethod
    def from_name(cls, name, **overrides):
        return DiT(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5,
                   class_dropout_prob=overrides["class_dropout_prob"])


def wrong(monkeypatch, name, spoil):
    """Replace the public op by one whose kernel is off; its reference stays right."""
    right = getattr(difuse_kernels, name)

    def op(*args, backend="auto", **kwargs):
        out = right(*args, backend=backend, **kwargs)
        return out if backend == "reference" else spoil(out)

    monkeypatch.setattr(difuse_kernels, name, op)


# timing

def test_contenders_take_turns_and_the_order_rotates():
    calls = []
    found = timing.interleaved({name: lambda name=name: calls.append(name) or time.sleep(1e-4) for name in "abc"},
                               least=1e-5)
    timed = calls[-21:]  # after the warm-up
    assert [timed[i] for i in range(0, 21, 3)] == list("abcabca")
    assert all(sorted(timed[i : i + 3]) == list("abc") for i in range(0, 21, 3))
    assert all(t.runs == 7 and t.inner == 1 and t.seconds >= 1e-4 for t in found.values())
    assert len(calls) >= 21 + 2 * 3  # everything was called twice before it counted


def test_short_calls_are_repeated_until_the_clock_can_see_them():
    found = timing.interleaved({"nothing": lambda: None, "slow": lambda: time.sleep(2e-3)}, least=1e-3)
    assert found["nothing"].inner > 1000 and found["slow"].inner == 1
    assert found["nothing"].seconds < 1e-5


def test_ratios_say_how_many_times_faster_we_are():
    part = timing.versus({"difuse": lambda: time.sleep(2e-3), "eager": lambda: time.sleep(12e-3)})
    assert part["ratios"].keys() == {"eager"} and part["ratios"]["eager"] > 1.5
    assert part["times"]["difuse"]["seconds"] < part["times"]["eager"]["seconds"]


def test_median_and_spread():
    found = timing.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 100.0], inner=3)
    assert found == timing.Timing(4.0, 3.0 / 4.0, 7, 3)  # quartiles 2.5 and 5.5


def test_fewer_runs_than_seven_are_refused_and_collection_comes_back():
    with pytest.raises(ValueError, match="at least 7"):
        timing.interleaved({"a": lambda: None}, runs=3)

    def fails():
        raise OSError("in the middle")

    state = iter(range(5))
    with pytest.raises(OSError):
        timing.interleaved({"a": lambda: time.sleep(1e-4) if next(state) < 4 else fails()}, least=1e-6)
    assert gc.isenabled()


# the gate

@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", TINY, ids=str)
def test_rows_of_every_op(case, dtype):
    rows = bench_ops.rows(case, dtype, CEILINGS)
    assert [row["pass"] for row in rows] == [bench_ops.FORWARD, bench_ops.BOTH]
    for row in rows:
        assert row["gate"]["ok"] and row["backend"] in OPS[case.op].backends
        assert row["times"].keys() == {"difuse", "eager"} and row["ratios"]["eager"] > 0
        assert row["bytes"] > 0 and row["predicted_seconds"] > 0 and row["share"] > 0
    assert rows[1]["bytes"] > rows[0]["bytes"]


def spoil_gradient(out):
    if out.requires_grad:
        out.register_hook(lambda grad: grad * 1.001)
    return out


def raises(out):
    raise RuntimeError("no such | kernel")


def spoil_output(out):
    return out * 1.001


def not_a_number(out):
    return out * torch.nan


@pytest.mark.parametrize("spoil", [spoil_output, spoil_gradient, not_a_number, raises])
def test_a_wrong_kernel_yields_no_speed(monkeypatch, spoil):
    wrong(monkeypatch, "norm_modulate", spoil)
    rows = bench_ops.rows(tiny("norm_modulate", "per_token"), "fp32", CEILINGS)
    assert len(rows) == 2
    for row in rows:
        assert not row["gate"]["ok"]
        assert not row.keys() & {"times", "ratios", "share", "targets"}
        cells = run.cells(row)
        assert len(cells) == len(run.COLUMNS) and cells[-1].startswith("WRONG") and "|" not in "".join(cells)
        assert not re.search(r"\d (ms|µs|s)\b", " ".join(cells))
        json.dumps(row, allow_nan=False)


def test_a_rival_that_computes_something_else_is_refused(monkeypatch):
    eager = rivals.EAGER["norm_modulate"]
    monkeypatch.setitem(rivals.EAGER, "norm_modulate", lambda *args, **kwargs: 1.01 * eager(*args, **kwargs))
    with pytest.raises(RuntimeError, match="rival eager"):
        bench_ops.rows(tiny("norm_modulate", "per_token"), "fp32", CEILINGS)


def test_forward_is_timed_without_grad_and_backward_with(monkeypatch):
    right, seen = difuse_kernels.gate_residual, []

    def op(*args, **kwargs):
        seen.append(torch.is_grad_enabled())
        return right(*args, **kwargs)

    monkeypatch.setattr(difuse_kernels, "gate_residual", op)
    bench_ops.rows(tiny("gate_residual", "odd"), "fp32", CEILINGS, passes=(bench_ops.FORWARD,))
    assert seen[-7:] == [False] * 7
    bench_ops.rows(tiny("gate_residual", "odd"), "fp32", CEILINGS, passes=(bench_ops.BOTH,))
    assert seen[-7:] == [True] * 7


def test_compile_joins_fails_in_sight_or_is_refused(monkeypatch):
    def broken(function):
        def call(*args):
            raise RuntimeError("CppCompileError: no compiler\nand a long log")
        return call

    monkeypatch.setattr(rivals, "compiled", lambda function: function)
    row = bench_ops.rows(tiny("norm_modulate", "per_token"), "fp32", CEILINGS, compiles=True)[0]
    assert row["times"].keys() == {"difuse", "eager", "compile"} and row["compile_seconds"] > 0
    monkeypatch.setattr(rivals, "compiled", broken)
    row = bench_ops.rows(tiny("norm_modulate", "per_token"), "fp32", CEILINGS, compiles=True)[0]
    assert "compile" not in row["times"] and "no compiler" in run.cells(row)[-1] and "log" not in run.cells(row)[-1]
    monkeypatch.setattr(rivals, "compiled", lambda function: lambda *args: 2 * function(*args))
    with pytest.raises(RuntimeError, match="rival compile"):
        bench_ops.rows(tiny("norm_modulate", "per_token"), "fp32", CEILINGS, compiles=True)


def test_the_users_ddim_step_equals_its_coefficients():
    g = torch.Generator().manual_seed(0)
    x, cond, uncond = torch.randn(3, 2, 4, 5, 5, generator=g, dtype=torch.float64)
    coefficients = torch.tensor([[0.7, 1.9, -0.4]])
    (got,) = rivals.ddim_with_guidance(coefficients)(x, cond, uncond)
    expected = sum(c * t for c, t in zip(coefficients[0].double(), (x, cond, uncond), strict=True))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (narrow,) = rivals.ddim_with_guidance(coefficients, (torch.bfloat16,))(x, cond, uncond)
    assert narrow.dtype == torch.bfloat16


# bytes, FLOPs, targets

def test_bytes_and_flops_by_hand():
    x, y = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    m = torch.randn(2, 8, requires_grad=True)
    big, small = 4 * 48, 4 * 16
    out = (torch.empty(2, 3, 8),)
    assert roofline.work("norm_modulate", (x, m, m), {}, out, False) == (2 * big + 2 * small, 8 * 48)
    # backward reads the gradient, x and scale again; it writes dx, dscale and dshift
    assert roofline.work("norm_modulate", (x, m, m), {}, out, True)[0] == 5 * big + 5 * small
    # dx of x + gate * y is the incoming gradient itself
    assert roofline.work("gate_residual", (x, y, m), {}, out, True)[0] == (3 + 3) * big + 3 * small
    assert roofline.work("patchify", (x, (2, 2)), {"order": "cpq"}, out, True) == (4 * big, 0)
    inputs, table = [x, y, torch.randn(2, 1, 8).expand(2, 3, 8)], torch.ones(1, 3)
    assert roofline.work("sampler_step", (inputs, table), {}, out, False) == (3 * big + small + 12, 2 * 3 * 48)
    q, k = torch.empty(2, 3, 4, 8), torch.empty(2, 5, 2, 8)
    forward, both = (roofline.work("attention", (q, k, k), {}, (q,), backward)[1] for backward in (False, True))
    assert forward == 2 * (2 * 2 * 4 * 3 * 5 * 8) and both == 7 * (2 * 2 * 4 * 3 * 5 * 8)


def test_against_the_ceilings():
    found = roofline.against(CEILINGS, "bf16", int(1e7), int(2e8), seconds=4e-3)
    assert found["predicted_seconds"] == pytest.approx(2e-3) and found["bound"] == "flops"  # at float32's higher rate
    assert found["share"] == pytest.approx(0.5) and found["copy_share"] == pytest.approx(0.25)
    assert not found["in_cache"] and roofline.against(CEILINGS, "fp32", 1000, 0, 1.0)["in_cache"]


def test_ceilings_are_measured():
    found = roofline.ceilings({"fp32": torch.float32, "bf16": torch.bfloat16})
    assert found.keys() == CEILINGS.keys() and all(value > 0 for value in found.values())


def test_every_target_is_met_by_a_timed_case():
    heads = [{"op": case.op, "pass": name, "dtype": dtype, "shape": bench_ops.first_shape(case)}
             for case in [*cases(speed=True), *bench_ops.ONE_ROW] for dtype in ("fp32", "bf16")
             for name in ((bench_ops.OVERHEAD,) if case.name == "one_row" else (bench_ops.FORWARD, bench_ops.BOTH))]
    for target in bench_ops.TARGETS:
        wanted = target.shapes or (None,)
        for one in wanted:
            only = target if one is None else bench_ops.Target(**{**vars(target), "shapes": (one,)})
            assert {head["op"] for head in heads if only.fits(head)} == set(target.ops), f"{only} is never judged"
    assert {case.op for case in bench_ops.ONE_ROW} == set(OPS)


def test_targets_are_judged_in_their_own_metric():
    row = {"times": {"difuse": {"seconds": 6e-6}}, "ratios": {"eager": 2.9}, "copy_share": 0.9}
    judged = {metric: bench_ops.Target(("x",), "y", metric, value).judge(row)
              for metric, value in (("eager", 3.0), ("compile", 1.3), ("copy", 0.85), ("us", 8.0))}
    assert {metric: found["reached"] for metric, found in judged.items()} == {
        "eager": False, "compile": None, "copy": True, "us": True}
    assert run._target(judged["eager"]) == "3x eager: NO" and run._target(judged["compile"]).endswith("not run")


# models

def test_the_plain_twin_is_the_same_model(tiny_cases):
    model, _, (x, t, y) = bench_model.build("DiT-tiny", quick=True)
    model = model.double().eval()
    with difuse_kernels.use_backend("reference"), torch.no_grad():
        expected = model(x.double(), t, y)
    torch.testing.assert_close(rivals.PlainDiT.like(model)(x.double(), t, y).detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [bench_model.model_rows, bench_train.training_rows])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_model_rows(tiny_cases, monkeypatch, rows, dtype):
    monkeypatch.setattr(rivals, "compiled", lambda network: network)
    for row in rows("DiT-tiny", dtype, CEILINGS, quick=True, compiles=True):
        assert row["gate"]["ok"], row["gate"]
        if row["pass"] == bench_model.SAMPLING:
            assert row["times"].keys() == {"difuse", "eager"}
        else:
            assert row["times"].keys() == {"difuse", "eager", "compile"}
            assert row["compile_seconds"] > 0 and "flops" in row
        assert len(run.cells(row)) == len(run.COLUMNS)


def test_frozen_rows(tiny_cases, monkeypatch):
    monkeypatch.setattr(rivals, "compiled", lambda network: network)
    made = {}

    def built(name, plain, inputs, precision):  # stands for other engines
        made[name, precision] = plain
        return (plain.forward, None) if name == "openvino" else (None, "is not installed")

    monkeypatch.setattr(bench_frozen.converted_rivals, "build", built)
    monkeypatch.setattr(bench_frozen, "TRAJECTORIES", {("DiT-tiny", 2)})
    monkeypatch.setattr(bench_frozen, "WIDE", ("DiT-tiny",))
    monkeypatch.setattr(bench_frozen, "TARGETS", (
        bench_frozen.Target(("DiT-tiny",), bench_ops.FORWARD, "openvino", 1.0, ("int8",)),))
    found = bench_frozen.rows("DiT-tiny", 2, ["fp32", "int8"], CEILINGS, compiles=True)
    assert [(row["dtype"], row["pass"]) for row in found] == [
        (precision, kind) for precision in ("fp32", "int8") for kind in (bench_ops.FORWARD, bench_frozen.TRAJECTORY)]
    assert {precision for _, precision in made} == {"fp32", "int8"} and len(made) == 4
    for row in found:
        forward = row["pass"] == bench_ops.FORWARD
        assert row["gate"]["ok"], row["gate"]
        assert row["engines"] == {"openvino": "measured", "onnxruntime": "is not installed"}
        assert row["times"].keys() == {"difuse", "eager", "openvino"} | ({"compile"} if forward else set())
        assert row["errors"]["difuse"] > 1e-4 if row["dtype"] == "int8" else row["errors"]["difuse"] < 1e-5
        assert row["errors"]["eager"] < 1e-5 and len(run.cells(row)) == len(run.COLUMNS)
        assert ("flops" in row) == (forward and row["dtype"] == "fp32")
        assert len(row["targets"]) == (forward and row["dtype"] == "int8")


def test_the_users_ddim_is_difuses():
    model, _, (x, _, y) = bench_model.build("DiT-S/2", quick=True)
    noise, _ = bench_frozen.initial_noise(x.shape[1:], [0, 1])
    with torch.no_grad():
        ours = difuse.sample(model, y, process=bench_frozen.PROCESS, prediction="eps", steps=bench_frozen.STEPS,
                             guidance=bench_frozen.GUIDANCE)
        assert rivals.difference([bench_frozen.users_ddim(model.eval(), noise, y, model.num_classes)], [ours]) < 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_engine_rows(tiny_cases, dtype):
    (row,) = bench_engine.serving_rows("DiT-tiny", dtype, CEILINGS, quick=True)
    assert row["gate"]["ok"], row["gate"]
    assert row["times"].keys() == {"difuse", "eager", "alone"}
    assert [target["metric"] for target in row["targets"]] == ["alone"] and "1.5x alone" in run.cells(row)[-1]


@pytest.mark.parametrize("rows", [bench_model.model_rows, bench_train.training_rows, bench_engine.serving_rows])
def test_a_wrong_model_yields_no_speed(tiny_cases, monkeypatch, rows):
    wrong(monkeypatch, "attention_packed", lambda out: out * 1.001)
    monkeypatch.setattr("difuse.models.layers.attention_packed", difuse_kernels.attention_packed)
    monkeypatch.setattr("difuse.inference.fused_block.dit_block", lambda *args, **kwargs: 1.001 * dit_block(
        *args, **kwargs))
    for row in rows("DiT-tiny", "fp32", CEILINGS, quick=True):
        assert not row["gate"]["ok"] and "times" not in row
        assert run.cells(row)[-1].startswith("WRONG")


def test_a_wrong_frozen_model_yields_no_speed_in_any_precision(tiny_cases, monkeypatch):
    monkeypatch.setattr("difuse.inference.fused_block.dit_block", lambda *args, **kwargs: 1.001 * dit_block(
        *args, **kwargs))
    (row,) = bench_frozen.rows("DiT-tiny", 2, ["fp32", "int8"], CEILINGS, quick=True)
    assert not row["gate"]["ok"] and "times" not in row


def test_emulated_bfloat16_is_left_out_in_sight_unless_asked_for(tiny_cases, monkeypatch):
    monkeypatch.setattr(bench_model, "emulates_bfloat16", lambda: True)
    jobs = bench_model.jobs(run.parse(["model", "--quick"]), CEILINGS)
    (row,) = jobs[1][1]()
    assert jobs[1][0] == "DiT-tiny bf16" and "emulates" in run.cells(row)[-1] and "times" not in row
    (asked,) = bench_model.jobs(run.parse(["model", "--quick", "--dtype", "bf16"]), CEILINGS)
    assert "times" in asked[1]()[0]


# the command

def test_a_run_writes_its_report_and_prints_it(tiny_cases, tmp_path, capsys):
    assert run.main(["all", "--quick", "--dtype", "fp32", "--out", str(tmp_path / "new")]) == 0
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert [name.rpartition(".")[2] for name in files] == ["json", "md"]
    report = json.loads((tmp_path / "new" / files[0]).read_text())
    text = (tmp_path / "new" / files[1]).read_text()
    assert text.strip() in capsys.readouterr().out
    assert report["schema"] == run.SCHEMA and report["complete"]
    machine = report["machine"]
    assert machine["command"] == f"python -m benchmarks.run all --quick --dtype fp32 --out {tmp_path / 'new'}"
    assert machine["torch"] == torch.__version__ and machine["threads"] == torch.get_num_threads()
    for key in ("cpu", "cores", "python", "difuse", "commit", "date", "load_average"):
        assert machine[key] is not None and str(machine[key]) in text
    assert {row["op"] for row in report["rows"]} == {*OPS, "packed_linear", "DiT-tiny", "sampler update"}
    assert {row["group"] for row in report["rows"]} == {"ops", "linear", "model", "frozen", "train", "engine",
                                                        "update"}
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(report["rows"]) and len({line.count("|") for line in table}) == 1
    assert "GB/s into fresh memory" in text and "GFLOP/s fp32" in text and "±" in text
    assert bool(machine["avx512"]) != ("no AVX-512" in text)


def test_a_failed_gate_is_the_exit_code(tiny_cases, tmp_path, monkeypatch, capsys):
    wrong(monkeypatch, "patchify", lambda out: out + 1)
    assert run.main(["ops", "--op", "patchify", "--quick", "--dtype", "fp32", "--out", str(tmp_path)]) == 1
    assert "Correctness gates failed: 2" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_rows(tiny_cases, tmp_path, monkeypatch):
    rows, calls = bench_ops.rows, iter(range(9))

    def interrupted(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return rows(*args)

    monkeypatch.setattr(bench_ops, "rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.main(["ops", "--quick", "--dtype", "fp32", "--out", str(tmp_path)])
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert not report["complete"] and len(report["rows"]) == 4
    assert "interrupted" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize("argv, message", [
    (["--op", "atention"], "attention"), (["nonsense"], "train"), (["--dtype", "fp8"], "fp32"),
    (["model", "--op", "attention"], "group ops"), (["--out", "/proc/nowhere"], "cannot write"),
    (["ops", "--case", "no such case", "--quick"], "no case of ops fits"),
    (["model", "--dtype", "fp16", "--quick"], "DiT-tiny")])
def test_bad_arguments(tiny_cases, argv, message, capsys):
    with pytest.raises((SystemExit, OSError)) as stopped:
        run.main(argv)
    assert message in f"{stopped.value} {capsys.readouterr().err}" and stopped.value.args[0] != 0


def test_which_cases_are_compiled(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_ops, "rows", lambda case, dtype, c, passes, compiles: seen.append((case, compiles)))

    def compiled(*argv):
        seen.clear()
        for _, job in bench_ops.jobs(run.parse([*argv, "--dtype", "fp32"]), CEILINGS):
            job()
        return {case.name for case, compiles in seen if compiles}

    everything = {case.name for case in cases("patchify", speed=True)}
    assert compiled("ops", "--op", "patchify") == everything
    assert len(compiled("ops") & everything) == 1
    assert {case.name for case in cases("norm_modulate", speed=True)} <= compiled("ops")
    assert not compiled("ops", "--quick") and not compiled("ops", "--no-compile")
    assert len([case for case, _ in seen if case.op == "norm_modulate"]) == len(cases("norm_modulate", True)) + 1


def test_one_row_cases_are_cases():
    assert all(isinstance(case, Case) and bench_ops.first_shape(case)[0] == 1 for case in bench_ops.ONE_ROW)
