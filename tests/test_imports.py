"""Importing is free of surprises, and the reference path stands alone. Each check runs in a fresh process."""
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["difuse_kernels", "difuse"]
BLOCK = """
import sys
sys.modules["triton"] = sys.modules["difuse_kernels._native"] = None
"""


def fresh(code, **environment):
    """Run `code` in a new interpreter; (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment},
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def report(code, **environment):
    """The JSON that `code` prints."""
    status, out, err = fresh(code, **environment)
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def test_the_reference_path_runs_alone_with_one_warning():
    """No triton, no native module: every op, forward and backward, on every named case."""
    found = report(BLOCK + """
import json, warnings, torch, difuse_kernels
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.cases import cases
from difuse_kernels.testing.numerics import backends_here, check_case
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ran = {}
    for case in cases():
        lines = check_case(case, torch.bfloat16, "auto")
        assert all(line.ok for line in lines), (str(case), lines)
        ran[case.op] = ran.get(case.op, False) or any(line.name.startswith("grad") for line in lines)
print(json.dumps([ran, sorted(OPS), {op: backends_here(op) for op in OPS}, [str(w.message) for w in caught]]))
""")
    ran, ops, here, warned = found
    assert sorted(ran) == ops and all(ran.values())  # each op, and its gradients
    assert all(backends == ["reference"] for backends in here.values())
    warned = [text for text in warned if text.startswith("difuse")]
    assert len(warned) == 1
    assert "runs on 'reference', not on 'cpu': the C++ extension is not loaded" in warned[0]


def test_fail_on_fallback_turns_the_warning_into_an_error():
    code = BLOCK + "import torch, difuse_kernels\ndifuse_kernels.gate_residual(*torch.zeros(2, 1, 2, 3), backend={!r})"
    status, _, err = fresh(code.format("auto"), DIFUSE_FAIL_ON_FALLBACK="1")
    assert status != 0 and "RuntimeError: difuse: gate_residual runs on 'reference', not on 'cpu'" in err
    status, _, err = fresh(code.format("reference"), DIFUSE_FAIL_ON_FALLBACK="1")  # asked for: not a fallback
    assert status == 0, err


@pytest.mark.parametrize("package", PACKAGES)
def test_import_brings_no_optional_package_touches_no_cuda_changes_no_global(package):
    found = report(f"""
import json, sys, types, warnings, torch
import torch.nn.functional, torch.nn
places = {{"torch": torch, "functional": torch.nn.functional, "nn": torch.nn, "Tensor": torch.Tensor,
          "cuda": torch.cuda, "warnings": warnings, "sys": sys, "builtins": __builtins__}}
before = {{name: dict(vars(place)) for name, place in places.items()}}
modules, settings = set(sys.modules), (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                                       torch.get_rng_state().tolist(), list(warnings.filters))
import {package}
changed = [f"{{name}}.{{key}}" for name, place in places.items() for key, value in vars(place).items()
           if before[name].get(key, None) is not value and not isinstance(value, types.ModuleType)]
gone = [f"{{name}}.{{key}}" for name, place in places.items() for key in before[name] if key not in vars(place)]
same = settings == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                    torch.get_rng_state().tolist(), list(warnings.filters))
print(json.dumps([changed + gone, same, torch.cuda.is_initialized(),
                  sorted({{name.partition(".")[0] for name in set(sys.modules) - modules}})]))
""")
    changed, same_settings, cuda, brought = found
    assert changed == [] and same_settings and not cuda
    assert package in brought
    optional = {"triton", "diffusers", "transformers", "sklearn", "scipy", "matplotlib", "PIL", "pandas", "hypothesis",
                "pytest", "pybind11", "peft", "accelerate"}
    assert not optional & set(brought)


def test_import_costs_little_over_torch():
    """CPU time, so that a busy machine does not count; difuse on top of difuse_kernels."""
    code = """
import time, torch
start = time.process_time()
import difuse_kernels
between = time.process_time()
import difuse
print([between - start, time.process_time() - between])
"""
    seconds = [statistics.median(times) for times in zip(*(report(code) for _ in range(3)), strict=True)]
    assert all(each < 0.05 for each in seconds), f"{PACKAGES} take {seconds} s over import torch; at most 0.05 each"
