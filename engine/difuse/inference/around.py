"""A module around another one, which answers for it."""
from torch import nn


class Around(nn.Module):
    """A module around `model`, whose other attributes are the model's."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self._modules:
                raise
            return getattr(self.model, name)
