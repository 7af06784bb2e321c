"""difuse: diffusion transformers on hand-written kernels, with a plain-PyTorch reference for each of them.

    model = difuse.models.DiT.from_name("DiT-S/2", input_size=32, in_channels=4, num_classes=10)
    images = difuse.sample(model, labels, process=VP("linear"), prediction="eps")
    with difuse.use_backend("reference"): ...      # the same program in plain PyTorch
    print(difuse.explain())                        # what ran where, and why

    report = difuse.accelerate(pipe.transformer)   # a model of diffusers or facebookresearch, in place

Names are imported on first use, so that `import difuse` costs little over `import torch`.
"""
import importlib

__version__ = "0.1.0"

_EXPORTS = {  # public name -> module that holds it
    "use_backend": "difuse_kernels",
    "accelerate": "difuse.integrations",
    "restore": "difuse.integrations",
    "cache_conditioning": "difuse.integrations",
    "explain": "difuse.integrations",
    "explain_reset": "difuse_kernels",
    "sample": "difuse.inference.sample",
    "freeze": "difuse.inference.freeze",
    "fidelity": "difuse.inference.fidelity",
    "recorded_calls": "difuse.inference.fidelity",
    "Graphs": "difuse.inference.graphs",
    "Engine": "difuse.inference.engine",
    "Request": "difuse.inference.requests",
    "Trainer": "difuse.training",
    "TrainConfig": "difuse.training",
}
_PACKAGES = ("models", "diffusion", "integrations", "inference", "training", "evaluation")
__all__ = ["__version__", *_EXPORTS, *_PACKAGES]


def __getattr__(name):
    if name in _PACKAGES:
        return importlib.import_module(f"difuse.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'difuse' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
