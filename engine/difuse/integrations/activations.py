"""GELU by its approximation with tanh, which torch computes slowly on CPUs: its own module, and diffusers'."""
import torch.nn.functional as F

from difuse.integrations.registry import register
from difuse_kernels import gelu_tanh

# no `ops` are declared: a model may be given a GPU's backend, for which gelu_tanh is torch's own


def _by_erf(module):
    return None if module.approximate == "tanh" else f"approximate is {module.approximate!r}; only tanh has a kernel"


def _gelu(module, x):
    return gelu_tanh(x) if module.approximate == "tanh" else F.gelu(x, approximate=module.approximate)


@register("torch.nn.modules.activation.GELU", refuses=_by_erf, kind="layer")
def gelu(self, input):
    """input [...]; nn.GELU."""
    return _gelu(self, input)


@register("diffusers.models.activations.GELU", refuses=_by_erf, kind="layer")
def projected_gelu(self, hidden_states):
    """[...,D] -> [...,F]: the GELU of a projection."""
    return _gelu(self, self.proj(hidden_states))
