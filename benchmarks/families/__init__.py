"""The model families that difuse.accelerate knows, each with a small model and true-width blocks to be judged on.

Used by tests/test_accelerate*.py and by benchmarks/equivalence.py.
"""
import importlib

NAMES = ("facebook_dit", "sit", "dit", "pixart", "flux", "flux2", "qwenimage", "sd3", "wan", "ltx", "hidream", "unet",
         "unet_xl", "vae")


def load(name):
    """The `Family` called `name`; imports its file, and so the package that its models come from."""
    return importlib.import_module(f"benchmarks.families.{name}").FAMILY
