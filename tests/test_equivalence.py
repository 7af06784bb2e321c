"""The command that writes docs/equivalence.md, on one small family, and on one whose errors are too large."""
import dataclasses

import pytest
import torch
from torch import nn

import difuse
from benchmarks import equivalence
from benchmarks.families import NAMES, load

pytest.importorskip("diffusers")


def small_block(dtype):
    block = load("sit").build().to(dtype).blocks[0]
    return block, (), {"x": torch.randn(1, 4, block.norm1.normalized_shape[0]).to(dtype),
                       "c": torch.randn(1, block.norm1.normalized_shape[0]).to(dtype)}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(equivalence, "load",
                        lambda name: dataclasses.replace(load(name), wide={"small block": small_block}))
    return equivalence.main


def test_errors_and_speeds_of_one_family(quick, tmp_path):
    out = tmp_path / "docs" / "equivalence.md"
    assert quick(["--family", "sit", "--out", str(out)]) == 0
    text = out.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "small block" in line]
    assert [row.split(" | ")[2:4] for row in rows] == [["float32", "forward"], ["float32", "training"],
                                                       ["bfloat16", "forward"], ["bfloat16", "training"]]
    assert " dB |" in text and "OUT OF BUDGET" not in text and "torch 2" in text and "threads" in text


def test_one_table_and_then_the_other(quick, tmp_path):
    assert quick(["--family", "sit", "--only", "errors", "--out", str(tmp_path / "e.md")]) == 0
    text = (tmp_path / "e.md").read_text()
    assert " dB |" in text and "small block" not in text
    assert quick(["--family", "sit", "--only", "speed", "--out", str(tmp_path / "e.md")]) == 0
    text = (tmp_path / "e.md").read_text()
    assert " dB |" in text and "small block" in text  # the errors of the run before are kept
    assert text.count(" threads, ") == 2  # each table says where it was made


def broken(model, **options):
    """Stands in for accelerate; its biases are off by a thousandth."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            forward = module.forward
            module.forward = lambda x, forward=forward: forward(x) * 1.001


def test_errors_beyond_the_budget_are_said_and_the_status_is_1(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(difuse, "accelerate", broken)
    with pytest.raises(AssertionError, match="sit, small block, float32: differs by .*; no speed"):
        quick(["--family", "sit", "--out", str(tmp_path / "e.md")])
    assert quick(["--family", "sit", "--only", "errors", "--out", str(tmp_path / "e.md")]) == 1
    assert "OUT OF BUDGET" in (tmp_path / "e.md").read_text()


def test_every_family_has_a_title_and_wide_blocks():
    families = [load(name) for name in NAMES]
    assert len({family.title for family in families}) == len(families) and all(family.wide for family in families)
