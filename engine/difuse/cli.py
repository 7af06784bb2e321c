"""The command line: `difuse demo | train | sample | doctor | explain | bench`. Only the commands import torch."""
import argparse
import os
import pathlib
import subprocess
import sys
import traceback

from difuse.files import check_folder

# what a user's input can cause; anything else is a bug of difuse and keeps its traceback
USER_ERRORS = (ValueError, OSError, RuntimeError, ImportError, ArithmeticError, MemoryError)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message):
        raise SystemExit(_complain(f"{message}; see {self.prog} --help"))


def main(argv=None):
    """Run one command; return its exit code: 0 done, 1 done and found wanting, 2 bad input, 130 interrupted."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.run is _bench:
        args.arguments = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, so that a closed pipe shows below
        return code
    except KeyboardInterrupt:
        print(f"difuse: interrupted{args.interrupted(args)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `difuse explain | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if args.traceback:
            traceback.print_exc()
        named = isinstance(error, OSError) and error.filename and error.strerror
        return _complain(f"{error.filename}: {error.strerror}" if named else str(error) or type(error).__name__)


def _complain(message):
    print(f"difuse: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser():
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS,
                        help="show where an error came from, for developers")
    parser = Parser(prog="difuse", parents=[common], formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, description="Train, sample and measure diffusion transformers.",
                    epilog="""first steps:
  difuse doctor                      what this machine offers, and what is missing
  difuse demo                        train on real digits and draw new ones, about three minutes
  difuse train config.toml           your own run; the same command continues it after any stop
  difuse sample CHECKPOINT           draw from it
difuse COMMAND --help says more about each.""")
    parser.set_defaults(traceback=False, interrupted=lambda args: "")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name, run, help, epilog, add_help=True):
        sub = commands.add_parser(name, parents=[common], help=help, description=f"{help[0].upper()}{help[1:]}.",
                                  epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  allow_abbrev=False, add_help=add_help)
        sub.set_defaults(run=run)
        return sub

    _demo_command(command)
    _train_command(command)
    _sample_command(command)
    command("doctor", _doctor, "say what this machine and installation offer, and what to do about the rest",
            "Each line begins with ok, no (difuse works without it) or broken. Exit code 1 if anything is broken.")
    sub = command("explain", _explain, "show which op runs on which backend here, and why", """examples:
  difuse explain                             the support table
  difuse explain DiT-S/2                     run two blocks of that size forward and backward, say what ran where
  difuse explain runs/x/step-001000.safetensors    the same with a trained model""")
    sub.add_argument("target", nargs="?", help="a model name such as DiT-XL/2, or a checkpoint")
    # no options of its own: --help too goes to benchmarks.run
    command("bench", _bench, "run the benchmarks of a source checkout", None, add_help=False)
    return parser


def _demo_command(command):
    sub = command("demo", _demo, "train a small diffusion transformer on real handwritten digits and judge its own", """
It writes samples.png, denoising.png, loss.png, report.json and model.safetensors, and says what ran where, how fast
beside the plain PyTorch reference, and how good the digits are. Exit code 1 if they miss the goals.

examples:
  difuse demo
  difuse demo --quick --out /tmp/demo        about 20 s, to see that everything works; quality is not judged""")
    sub.add_argument("--out", default="demo", metavar="DIR", help="folder to write to (default: demo)")
    sub.add_argument("--seconds", type=_positive(float), help="training time, at most 90 s (default: 85; quick: 5)")
    sub.add_argument("--quick", action="store_true", help="a few seconds of training, quality not judged")


def _train_command(command):
    sub = command("train", _train, "train a model as a TOML file says; run it again to continue", """
A config file holds one setting per line; an unknown one is refused and the nearest valid name given:

  model = "DiT-S/2"            # or a table [model] with patch_size, hidden_size, depth, num_heads
  data = "photos"              # a folder with one subfolder of images per class, or "digits"
  image_size = 64
  objective = "flow"           # or "eps"
  steps = 20000
  learning_rate = 2e-4

examples:
  difuse train config.toml                        writes to runs/config
  difuse train config.toml --data photos/cats     another folder of images
  difuse train config.toml --out /data/run1       checkpoints and metrics.jsonl there

Ctrl-C saves first. However it ends, the same command continues from the last checkpoint, bit for bit.""")
    sub.add_argument("config", metavar="CONFIG.toml")
    sub.add_argument("--data", metavar="FOLDER", help='folder of images or "digits", instead of the one in the config')
    sub.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/ and the config's name)")
    sub.set_defaults(interrupted=_how_to_resume)


def _sample_command(command):
    sub = command("sample", _sample, "draw images from a checkpoint into a PNG, one row per label", """examples:
  difuse sample demo/model.safetensors
  difuse sample demo/model.safetensors --labels 3,7 --n 16 --out sevens.png
  difuse sample demo/model.safetensors --sampler ddim --steps 25 --guidance 2 --seed 7
  difuse sample demo/model.safetensors --precision int8    and say what the 8 bits changed

An image depends on its seed and label alone: the k-th image of a row always has seed --seed + k.""")
    sub.add_argument("checkpoint", metavar="CHECKPOINT")
    sub.add_argument("--labels", type=_labels, help="class numbers, e.g. 0,1,2 (default: all, at most ten)")
    sub.add_argument("--n", type=_positive(int), default=8, help="images per label (default: 8)")
    sub.add_argument("--sampler", help="e.g. unipc, dpm_solver_pp_2m (default: flow_euler for flow models, else ddim)")
    sub.add_argument("--steps", type=_positive(int), default=50, help="steps of the sampler (default: 50)")
    sub.add_argument("--spacing", help="of the steps' times, e.g. karras, log_snr (default: the process's own)")
    sub.add_argument("--guidance", type=float, default=1.5, help="classifier-free guidance, 1 is off (default: 1.5)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--precision", choices=("fp32", "bf16", "int8"),
                     help="freeze the model first, its blocks' products in this precision; below fp32 the error is "
                          "measured and printed")
    sub.add_argument("--batch-size", type=_positive(int), default=64, help="images at a time (default: 64)")
    sub.add_argument("--scale", type=_positive(int), help="side of a drawn pixel (default: images of about 128)")
    sub.add_argument("--out", default="samples.png", metavar="FILE.png")


def _positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse: invalid <name> value
    return parse


def _labels(text):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of class numbers such as 0,1,2") from None


def _demo(args):
    from difuse.demo import run

    return run(check_folder(args.out), seconds=args.seconds, quick=args.quick)


def _train(args):
    import dataclasses

    from difuse.training import TrainConfig, Trainer, build_model, load_dataset

    try:
        config = TrainConfig.from_toml(args.config)
    except TypeError as error:  # a value of the wrong type in the file
        raise ValueError(str(error)) from error
    if args.data:
        config = dataclasses.replace(config, data=args.data)
    if not config.data:
        raise ValueError(f"{args.config}: no data named; set data = \"FOLDER\" there, or give --data FOLDER")
    out = check_folder(_run_folder(args))
    dataset = load_dataset(config.data, config.image_size)
    trainer = Trainer(build_model(config, dataset), dataset, config, out)
    trainer.train()
    print(f"{trainer.step} steps done: {trainer.last_checkpoint()}")
    print(f"draw from it: difuse sample {trainer.last_checkpoint()}")
    return 0


def _run_folder(args):
    return pathlib.Path(args.out) if args.out else pathlib.Path("runs", pathlib.Path(args.config).stem)


def _how_to_resume(args):
    data = f" --data {args.data}" if args.data else ""
    return f"; continue with: difuse train {args.config}{data} --out {_run_folder(args)}"


def _sample(args):
    from difuse.inference.command import run

    return run(args)


def _doctor(args):
    from difuse.doctor import main as examine

    return examine()


def _explain(args):
    from difuse_kernels.__main__ import main as print_support

    if args.target is None:
        print_support()
        return 0
    import torch

    from difuse_kernels import explain, explain_reset

    model = _model_to_explain(args.target).train()
    config, generator = model.config, torch.Generator().manual_seed(0)
    x = torch.randn(2, config["in_channels"], config["input_size"], config["input_size"], generator=generator)
    explain_reset()
    model(x, torch.tensor([1.0, 999.0]), torch.tensor([0, config["num_classes"] - 1])).square().mean().backward()
    print(f"one forward and backward of {args.target}, batch 2, {config['depth']} blocks, float32 on the CPU:")
    print(explain())
    return 0


def _model_to_explain(target):
    from difuse.models.dit import NAMES, DiT
    from difuse.training import load_model

    if target in NAMES:
        return DiT.from_name(target, depth=2)  # its blocks are all alike, and XL would take 5 GB
    if not pathlib.Path(target).exists():
        raise ValueError(f"{target!r} is neither a file nor a model name; expected a checkpoint or one of "
                         f"{', '.join(NAMES)}")
    return load_model(target)[0]


def _bench(args):
    checkout = pathlib.Path(__file__).parents[2]
    root = next((str(folder) for folder in (pathlib.Path.cwd(), checkout)
                 if (folder / "benchmarks" / "run.py").is_file()), None)
    if root is None:
        raise ValueError("the benchmarks are not part of the installed package; run this in a source checkout "
                         "(the folder that holds benchmarks/run.py)")
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, "-m", "benchmarks.run", *args.arguments],
                          env={**os.environ, "PYTHONPATH": path}, check=False).returncode
