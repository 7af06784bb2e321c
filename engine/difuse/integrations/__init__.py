"""Third-party models on difuse's ops, in place: accelerate, restore, explain, and the registry of what is known.

    report = difuse.accelerate(pipe.transformer)    # the forwards of known blocks, on this instance only
    difuse.restore(pipe.transformer)                # and back

One file per family of models, imported when a model of it is there: see `registry.KNOWN`.
"""
from difuse.integrations.accelerate import accelerate, explain, restore
from difuse.integrations.conditioning import cache_conditioning
from difuse.integrations.registry import register

__all__ = ["accelerate", "cache_conditioning", "explain", "register", "restore"]
