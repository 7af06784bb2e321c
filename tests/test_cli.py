"""The command line: what it writes, and one clear line with exit code 2 for what it cannot use."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from difuse import cli
from difuse.training import ImageDataset, TrainConfig, Trainer, build_model

TINY = {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 1}
TOML = """
data = "digits"
batch_size = 4
steps = 3
[model]
patch_size = 2
hidden_size = 16
depth = 1
num_heads = 1
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """objective -> a checkpoint of a tiny model on 3 classes of 4x4 images, trained for one step."""
    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = ImageDataset.from_arrays(images, torch.arange(6) % 3)
    found = {}
    for objective in ("flow", "eps"):
        config = TrainConfig(model=TINY, objective=objective, batch_size=2, steps=1)
        folder = tmp_path_factory.mktemp(objective)
        Trainer(build_model(config, data), data, config, folder, progress=False).train()
        (found[objective],) = folder.glob("step-*.safetensors")
    return found


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(TOML)
    return path


def png_size(path):
    Image = pytest.importorskip("PIL.Image")
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def python(*arguments, **options):
    roots = os.pathsep.join(str(pathlib.Path(cli.__file__).parents[i]) for i in (1,))
    path = os.pathsep.join(filter(None, (roots, *sys.path)))
    return subprocess.Popen([sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_help_teaches_every_command(capsys):
    for arguments, said in [([], "difuse sample"), (["demo"], "--quick"), (["train"], "learning_rate = "),
                            (["sample"], "--guidance"), (["explain"], "DiT-S/2"), (["doctor"], "broken")]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([*arguments, "--help"])
        assert stopped.value.code == 0
        assert said in capsys.readouterr().out


def test_help_does_not_import_torch():
    process = python("-c", "import sys, difuse.cli\ntry: difuse.cli.main(['--help'])\n"
                           "except SystemExit: pass\nsys.exit('torch' in sys.modules)")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "usage: difuse" in out


def test_train_writes_a_run_and_continues_it(config_file, capsys):
    pytest.importorskip("sklearn")
    assert cli.main(["train", str(config_file)]) == 0
    assert "runs/tiny/step-000003.safetensors" in capsys.readouterr().out
    config_file.write_text(TOML.replace("steps = 3", "steps = 5"))
    assert cli.main(["train", str(config_file)]) == 0
    lines = pathlib.Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 5]  # went on from step 3


def test_train_on_an_image_folder(config_file, capsys):
    Image = pytest.importorskip("PIL.Image")
    for name, grey in (("dark", 10), ("light", 240)):
        pathlib.Path("photos", name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), grey + i).save(f"photos/{name}/{i}.png")
    assert cli.main(["train", str(config_file), "--data", "photos", "--out", "here"]) == 0
    assert cli.main(["sample", "here/step-000003.safetensors", "--n", "3", "--steps", "2", "--scale", "1"]) == 0
    assert "labels 0, 1" in capsys.readouterr().out
    assert png_size("samples.png") == (3 * 9 + 1, 2 * 9 + 1)


@pytest.mark.parametrize("objective, sampler", [
    ("flow", None), ("flow", "flow_euler"), ("flow", "ddim"), ("flow", "ddpm"), ("eps", None), ("eps", "ddpm"),
])
def test_sample_draws_a_row_per_label(checkpoints, tmp_path, objective, sampler):
    out = tmp_path / "new" / "grid.png"
    chosen = ["--sampler", sampler] if sampler else []
    assert cli.main(["sample", str(checkpoints[objective]), "--labels", "2,0", "--n", "3", "--steps", "2", "--scale",
                     "2", "--out", str(out), *chosen]) == 0
    assert png_size(out) == (3 * (8 + 2) + 2, 2 * (8 + 2) + 2)


def test_sample_depends_on_the_seed_not_on_the_batch(checkpoints, tmp_path):
    def drawn(*options):
        assert cli.main(["sample", str(checkpoints["flow"]), "--n", "3", "--steps", "2", "--out",
                         str(tmp_path / "a.png"), *options]) == 0
        return (tmp_path / "a.png").read_bytes()

    pytest.importorskip("PIL")
    assert drawn() == drawn("--batch-size", "2", "--seed", "0")
    assert drawn() != drawn("--seed", "1")


@pytest.mark.filterwarnings("ignore:difuse.freeze")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("sampler", ["flow_euler", "ddim"])
def test_sample_in_a_lower_precision_says_what_it_changed(checkpoints, tmp_path, capsys, precision, sampler):
    pytest.importorskip("PIL")
    assert cli.main(["sample", str(checkpoints["flow"]), "--n", "3", "--steps", "5", "--sampler", sampler,
                     "--precision", precision, "--out", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().out.splitlines()
    if precision != "fp32":
        assert said[0].startswith(f"{precision} beside fp32, relative error of the model's results over 5 calls: ")
        assert float(said[0].split()[-3]) > 30  # dB
    assert said[-1].startswith("9 images in ") and len(said) == (1 if precision == "fp32" else 2)


def test_explain_shows_the_table_and_what_ran(checkpoints, capsys):
    assert cli.main(["explain"]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("attention", "norm_modulate", "sampler_step", "reference", "[1] "))
    assert cli.main(["explain", str(checkpoints["flow"])]) == 0
    ran = capsys.readouterr().out
    assert "calls" in ran and "attention" in ran and "sampler_step" not in ran  # it did not sample
    assert cli.main(["explain", "DiT-S/8"]) == 0
    assert "DiT-S/8, batch 2, 2 blocks" in capsys.readouterr().out


def test_doctor_finds_a_working_installation(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "native module" in out and "self-check" in out
    assert {line.split()[0] for line in out.splitlines()} <= {"ok", "no"}


def test_doctor_says_what_is_broken():
    process = python("-c", "import sys; sys.modules['torch'] = None\n"
                           "from difuse.cli import main; sys.exit(main(['doctor']))")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    assert "broken  torch cannot be imported" in out


def test_ctrl_c_saves_and_says_how_to_go_on(config_file, tmp_path):
    pytest.importorskip("sklearn")
    config_file.write_text(TOML.replace("steps = 3", "steps = 100000\nlog_every = 1"))
    process = python("-m", "difuse", "train", str(config_file), "--out", "run", cwd=tmp_path)
    deadline = time.monotonic() + 60
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"continue with: difuse train {config_file} --out run" in error and "Traceback" not in error
    assert len(list((tmp_path / "run").glob("step-*.safetensors"))) == 1


def test_bench_hands_its_arguments_on(tmp_path, monkeypatch, capfd):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "run.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--help", "--op", "attention", "x"]) == 3
    assert "['--help', '--op', 'attention', 'x']" in capfd.readouterr().out


def test_traceback_is_shown_on_request(capsys):
    assert cli.main(["train", "nowhere.toml", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def fails(capsys, arguments):
    """The one line that `difuse ARGUMENTS` says, after checking that it is one and that the exit code is 2."""
    try:
        code = cli.main(arguments)
    except SystemExit as stopped:  # argparse
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("difuse: error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("arguments, said", [
    ([], "required: COMMAND"),
    (["paint"], "invalid choice: 'paint'"),
    (["demo", "--seconds", "ninety"], "invalid number value: 'ninety'"),
    (["demo", "--seconds", "-5"], "-5 is not above zero"),
    (["demo", "--seconds", "600"], "at most 90"),
    (["train"], "required: CONFIG.toml; see difuse train --help"),
    (["train", "nowhere.toml"], "nowhere.toml: No such file"),
    (["train", "tiny.toml", "--out", "tiny.toml/run"], "cannot write to tiny.toml/run"),
    (["train", "tiny.toml", "--data", "nowhere"], "nowhere: no such folder"),
    (["train", "tiny.toml", "--colour"], "unrecognized arguments: --colour"),
    (["sample", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    (["sample", "x", "--labels", "one"], "'one' is not a list of class numbers"),
    (["sample", "x", "--n", "0"], "0 is not above zero"),
    (["sample", "x", "--n", "2.5"], "invalid whole number value: '2.5'"),
    (["sample", "x", "--sampler", "dim"], "did you mean 'ddim'?"),
    (["sample", "x", "--out", "samples.jpg"], "does not end in .png"),
    (["explain", "DiT-M/2"], "neither a file nor a model name"),
    (["doctor", "--fix"], "unrecognized arguments: --fix"),
])
def test_bad_arguments(config_file, capsys, arguments, said):
    assert said in fails(capsys, arguments)
    assert [entry.name for entry in pathlib.Path.cwd().iterdir()] == ["tiny.toml"]  # nothing was begun


@pytest.mark.parametrize("text, said", [
    ("stepz = 3", "unknown key 'stepz'; did you mean 'steps'?"),
    ("steps = 'many'", "steps is 'many'"),
    ("steps = ", "not valid TOML"),
    ("batch_size = 0", "batch_size is 0"),
    ("data = 'digits'", "no model given"),
    ("model = 'DiT-S/2'", "no data named"),
    ("model = 'DiT-M/2'\ndata = 'digits'", "'DiT-M/2' is unknown"),
])
def test_bad_configs(tmp_path, monkeypatch, capsys, text, said):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("bad.toml").write_text(text)
    assert said in fails(capsys, ["train", "bad.toml"])
    assert not pathlib.Path("runs").exists()


def test_bad_image_folders(config_file, capsys):
    pytest.importorskip("PIL")
    pathlib.Path("empty").mkdir()
    assert "empty" in fails(capsys, ["train", "tiny.toml", "--data", "empty"])
    pathlib.Path("broken").mkdir()
    pathlib.Path("broken/cat.png").write_bytes(b"\x89PNG, or so it says")
    assert "cat.png" in fails(capsys, ["train", "tiny.toml", "--data", "broken"])
    assert not pathlib.Path("runs").exists()


@pytest.mark.parametrize("options, said", [
    (["--labels", "0,3"], "the model knows 0 to 2"),
    (["--labels=-1"], "the model knows 0 to 2"),
    (["--guidance", "nan"], "guidance is nan"),
    (["--sampler", "ddim", "--steps", "1001"], "1 to 1000"),
    (["--out", "a.png/b.png"], "cannot write to a.png"),
])
def test_bad_sampling(checkpoints, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.png").write_text("a file")
    message = fails_without_progress(capsys, ["sample", str(checkpoints["flow"]), *options])
    assert said in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def fails_without_progress(capsys, arguments):
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # above it stands the progress bar
    assert line.startswith("difuse: error: ")
    return line


def test_bad_checkpoints(checkpoints, tmp_path, capsys):
    whole = checkpoints["flow"].read_bytes()
    cases = {"truncated": whole[: len(whole) // 2], "headless": whole[:20], "empty": b"", "foreign": b"PK\x03\x04" * 99}
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        assert str(path) in fails(capsys, ["sample", str(path), "--out", str(tmp_path / "a.png")])
    assert not (tmp_path / "a.png").exists()
