"""What the hardware suite measures, on stand-ins: rows of ops and models, gates, rivals that refuse, stale graphs."""
import json
import sys
import types

import pytest
import torch

import difuse_kernels
from benchmarks import (
    gpu_cases,
    gpu_ceilings,
    gpu_device,
    gpu_graphs,
    gpu_model,
    gpu_ops,
    gpu_report,
    gpu_rivals,
    rivals,
    timing,
)
from benchmarks.bench_ops import BOTH, FORWARD, ONE_ROW, OVERHEAD
from difuse_kernels.testing.case import Maker
from difuse_kernels.testing.cases import cases

DRY = gpu_device.DryRun()
NORM = next(case for case in ONE_ROW if case.op == "norm_modulate")
here = pytest.mark.skipif(torch.cuda.is_available() or not gpu_ceilings.kernel_backends("norm_modulate"),
                          reason="needs interpreted or emulated kernels")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "RUNS", 2)
    gpu_ops.gates.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine they wait for each other
    yield
    torch.set_num_threads(threads)


def rows_of(case, **options):
    return list(gpu_ops.rows(DRY, case, **options))


@here
def test_rows_of_an_op():
    rows = rows_of(NORM, compiles=True)
    assert [row["pass"] for row in rows] == [FORWARD, gpu_ops.GRAPH, BOTH]
    ours = {"difuse", *gpu_ceilings.kernel_backends("norm_modulate")[1:]}
    assert rows[0]["times"].keys() == ours | {"eager", "compile", "copy"} and rows[2]["bytes"] > rows[0]["bytes"]
    assert rows[1]["times"].keys() == ours | {"eager"} and rows[2]["times"].keys() == ours | {"eager", "compile"}
    json.dumps(rows, allow_nan=False)


def spoil(monkeypatch, name, how):
    right = getattr(difuse_kernels, name)

    def op(*args, backend="auto", **kwargs):
        out = right(*args, backend=backend, **kwargs)
        return out if backend == "reference" else how(out)

    monkeypatch.setattr(difuse_kernels, name, op)


@here
def test_a_wrong_kernel_yields_no_speed_and_exit_code_1(monkeypatch):
    spoil(monkeypatch, "norm_modulate", lambda out: out * 1.1)
    rows = rows_of(NORM)
    assert [row["pass"] for row in rows] == [FORWARD, BOTH] and not any("times" in row for row in rows)
    report = gpu_report.begin([], True)
    gpu_report.add(report, rows)
    assert len(gpu_report.failures(report)) == 2
    assert "WRONG, so no speed: " in gpu_report.table(report)


@here
def test_rivals_that_refuse_are_named_and_wrong_ones_stop_the_case(monkeypatch):
    def refuses(*args):
        raise RuntimeError("no kernel | for you")

    monkeypatch.setattr(gpu_ops, "further", lambda case, kwargs: {"other": refuses})
    rows = rows_of(NORM)
    assert all("other" not in row["times"] for row in rows)
    report = gpu_report.begin([], True)
    gpu_report.add(report, rows)
    assert "other refused: RuntimeError: no kernel / for you" in gpu_report.table(report)
    monkeypatch.setattr(gpu_ops, "further", lambda case, kwargs: {"other": lambda x, *rest: x})
    with pytest.raises(RuntimeError, match="rival other"):
        rows_of(NORM)


@here
def test_sets_share_weights_and_rotate_the_rest():
    case = next(case for case in cases("qk_norm_rope") if case.name == "gradcheck")
    sets = gpu_ops.Sets(case, torch.float32, DRY)
    assert len(sets.args) == 2
    weights = [leaf for leaf in sets.leaves[0] if any(leaf is other for other in sets.leaves[1])]
    assert len(weights) == 4 and len(sets.leaves[0]) == 6  # q and k are each set's own
    seen = []
    call = sets.rotating(lambda *args: seen.append(args) or args, sets.args)
    for _ in range(3):
        call()
    assert [got[0] is sets.args[i][0] for got, i in zip(seen, (0, 1, 0), strict=True)] == [True] * 3


def test_cases_drawn_once_are_the_same_numbers_in_every_dtype():
    case = gpu_cases.drawn_once(NORM, "cpu")
    wide, narrow = Maker(torch.bfloat16, work=torch.float64), Maker(torch.bfloat16)
    (x, *_), _ = case.build(wide)
    (y, *_), _ = case.build(narrow)
    assert x.dtype == torch.float64 and torch.equal(x, y.double()) and x.requires_grad and y.requires_grad
    assert x.data_ptr() != case.build(wide)[0][0].data_ptr()


def test_production_cases_exist_for_every_op():
    found = gpu_cases.production()
    assert {case.op for case in found} == {case.op for case in gpu_cases.on_gpus(ONE_ROW)}
    assert len({str(case) for case in found}) == len(found)


@here
def test_overhead_and_ceilings():
    (row,) = gpu_ceilings.overhead(DRY, NORM)
    assert row["pass"] == OVERHEAD and {"difuse", "eager"} <= row["times"].keys()
    first = next(gpu_ceilings.ceilings(DRY))
    assert all(value > 0 for value in first["ceilings"].values())


def test_a_missing_backend_is_loud(monkeypatch):
    monkeypatch.setitem(difuse_kernels.dispatch.MISSING, "triton", lambda: "triton went away")
    with pytest.raises(RuntimeError, match="backend triton: triton went away"):
        list(gpu_ceilings.ceilings(DRY))


def test_sdpa_liger_and_flash_attention_are_asked_for_what_the_case_computes(monkeypatch):
    q, k, v = torch.randn(3, 2, 5, 2, 8).unbind(0)
    flash = types.SimpleNamespace(flash_attn_func=lambda q, k, v, softmax_scale=None: difuse_kernels.attention(
        q, k, v, scale=softmax_scale, backend="reference"))
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    attention = types.SimpleNamespace(op="attention")
    found = gpu_rivals.further(attention, {"scale": 0.3})
    expected = difuse_kernels.attention(q, k, v, scale=0.3, backend="reference")
    assert found.keys() == {*gpu_rivals.SDPA, "flash_attn"}
    for name in ("sdpa flash", "flash_attn"):
        torch.testing.assert_close(found[name](q, k, v), expected, rtol=1e-5, atol=1e-6)
    assert not gpu_rivals.further(attention, {"key_bias": torch.zeros(2, 5)})
    packed = gpu_rivals.further(types.SimpleNamespace(op="attention_packed"), {})
    assert packed["sdpa flash"](torch.stack((q, k, v), 2)).shape == q.shape

    class Liger:
        @staticmethod
        def apply(a, b):
            return torch.nn.functional.silu(a) * b

    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.ModuleType("ops"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.swiglu", types.SimpleNamespace(LigerSiLUMulFunction=Liger))
    gated, h = types.SimpleNamespace(op="gated_activation"), torch.randn(2, 3, 16)
    for act_on in ("first", "second"):
        settings = {"activation": "silu", "act_on": act_on}
        torch.testing.assert_close(gpu_rivals.further(gated, settings)["liger"](h),
                                   difuse_kernels.gated_activation(h, **settings, backend="reference"))
    assert not gpu_rivals.further(gated, {})  # exact GELU: Liger has none


def test_a_stale_replay_is_wrong():
    a, b = torch.randn(2, 4, 4).unbind(0)
    assert gpu_graphs.row("w", "c", "fp32", torch.float32, [(a, a), (b, b)])["gate"]["ok"]
    stale = gpu_graphs.row("w", "c", "fp32", torch.float32, [(a, a), (a, a)])
    assert not stale["gate"]["ok"] and "ignored" in stale["gate"]["worst"]
    assert not gpu_graphs.row("w", "c", "fp32", torch.float32, [(a, a), (b, a)])["gate"]["ok"]
    json.dumps(gpu_graphs.row("w", "c", "fp32", torch.float32, [(a, a), (b * torch.nan, b)]), allow_nan=False)


@pytest.mark.parametrize("rows, batch", [(gpu_model.forward_rows, 2), (gpu_model.training_rows, 2),
                                         (gpu_model.sampling_rows, 1)])
def test_model_rows_and_their_gate(monkeypatch, rows, batch):
    monkeypatch.setattr(gpu_device.graphs, "record", lambda function, _device: function)
    monkeypatch.setattr(rivals, "compiled", lambda function, **options: function)
    (row,) = rows(DRY, 256, batch, compiles=True)
    assert row["gate"]["ok"], row["gate"]
    assert {"difuse", "eager", "compile"} <= row["times"].keys()
    replayed = {"difuse"} if rows is gpu_model.sampling_rows else set()  # no memory is given where a graph is replayed
    assert row["memory"].keys() == row["times"].keys() - replayed
    spoil(monkeypatch, "attention_packed", lambda out: out * 1.1)
    monkeypatch.setattr("difuse.models.layers.attention_packed", difuse_kernels.attention_packed)
    (row,) = rows(DRY, 256, batch)
    assert not row["gate"]["ok"] and "times" not in row
