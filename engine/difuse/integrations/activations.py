"""GELU by its approximation with tanh, which torch computes slowly on CPUs: its own module, and diffusers'."""
from difuse.integrations.registry import register
from difuse_kernels import gelu_tanh


def _by_erf(module):
    return None if module.approximate == "tanh" else f"approximate is {module.approximate!r}; only tanh has a kernel"


@register("torch.nn.modules.activation.GELU", refuses=_by_erf, ops=("gelu_tanh",), kind="layer")
def gelu(self, input):
    """input [...,F]; nn.GELU."""
    return gelu_tanh(input)


@register("diffusers.models.activations.GELU", refuses=_by_erf, ops=("gelu_tanh",), kind="layer")
def projected_gelu(self, hidden_states):
    """[...,D] -> [...,F]: the GELU of a projection."""
    return gelu_tanh(self.proj(hidden_states))
