"""Exponential moving average of the weights, the ones that are sampled with."""
import torch


class EMA:
    """Float32 averages of a model's parameters (buffers are not averaged).

    After optimizer step s = 0, 1, ... the average moves by 1 - min(decay, (1 + s) / (10 + s)) towards the weights, so
    that the random start is soon forgotten.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.averages = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        self._parameters = [p.detach() for p in model.parameters()]

    def decay_at(self, step):
        """The decay used after optimizer step `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step):
        """average <- decay * average + (1 - decay) * parameter, for all parameters at once."""
        torch._foreach_lerp_(list(self.averages.values()), self._parameters, 1 - self.decay_at(step))

    @torch.no_grad()
    def copy_to(self, model):
        """Write the averages into a model with the same parameter names."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.averages[name])
