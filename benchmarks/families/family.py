"""What the proofs need to know of a family of models, and the random weights and inputs that they use."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Family:
    """build() makes the small model (float32, eval mode, random weights: `randomise`), at most a second a forward.

    inputs(dtype) are forward's keyword arguments for it: B = 2, every sample with a timestep and conditioning of its
    own, odd sizes where the model takes them; return_dict=False where there is one. blocks: how many of its blocks
    `accelerate` counts; left_alone: how many known modules it leaves alone. sample, time: the names of the noisy input
    and of the timestep among the keywords; a model without a timestep has no trajectory.
    times: what the model calls the beginning and the end of a trajectory. channels: how many of the output's channels
    (dim 1, or the last of tokens) are the update; None: all.
    wide: name of a block at a published model's width -> function(dtype) -> (block, args, kwargs), the latter two as
    the model hands them over. lora: names of the Linears that PEFT is to adapt.
    """

    name: str
    title: str
    build: Callable
    inputs: Callable
    blocks: int
    left_alone: int = 0
    wide: dict[str, Callable] = field(default_factory=dict)
    sample: str = "hidden_states"
    time: str | None = "timestep"
    times: tuple[float, float] = (1.0, 0.0)
    channels: int | None = None
    lora: tuple[str, ...] = ("to_q", "to_v")


def randomise(module, seed=0):
    """Random weights of the size that keeps activations near 1, none zero, none one; buffers as they are. In place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1 and "table" not in name:
                values *= weight[0].numel() ** -0.5
            elif "norm" in name and name.endswith("weight"):
                values = 1 + 0.3 * values
            else:
                values *= 0.3
            weight.copy_(values)
    return module.eval()


class Draw:
    """Random tensors from one generator, rounded to a dtype: draw(2, 5, 8)."""

    def __init__(self, dtype, seed=1):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=1.0, dtype=None):
        """A normal tensor."""
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype)

    def times(self, batch, scale=1.0, dtype=None):
        """A timestep of its own for every sample, within 0 and `scale`, of those that bfloat16 holds a thousandfold."""
        return (torch.tensor([0.125, 0.5, 0.25])[:batch] * scale).to(dtype or self.dtype)
