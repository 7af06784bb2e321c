"""difuse's own models. They call the public ops of difuse_kernels only, so `use_backend` rules them."""
from difuse.models.dit import DiT

__all__ = ["DiT"]
