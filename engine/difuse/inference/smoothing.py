"""Smoothing of outlying channels, SmoothQuant: Xiao et al. 2023 (arXiv:2211.10438), from a few calls of the model.

    (x / s) (s W),   s_k = max |x_k|^alpha / max |w_k|^(1 - alpha)
"""
import torch

ALPHA = 0.5  # the paper's


@torch.no_grad()
def largest_inputs(model, linears, calls):
    """{path: max |x_k| over all rows that the nn.Linear at that path was given, [K]}, of `linears` {path: module}.

    calls: of the model, each a tuple of arguments or a dict of keyword arguments. Raises ValueError for what is none,
    naming the call that the model cannot take.
    """
    if not isinstance(calls, (list, tuple)) or not calls:
        what = "empty" if isinstance(calls, (list, tuple)) else f"a {type(calls).__name__}"
        raise ValueError(f"freeze: example_inputs is {what}; expected a list of calls of the model")
    found = {}

    def watch(path):
        def hook(_linear, inputs):
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])  # [M,K]
            if not len(rows):
                return
            largest = rows.abs().amax(0)  # [K]
            found[path] = torch.maximum(found[path], largest) if path in found else largest

        return hook

    hooks = [linear.register_forward_pre_hook(watch(path)) for path, linear in linears.items()]
    try:
        for number, call in enumerate(calls):
            if not isinstance(call, (tuple, list, dict)):
                raise ValueError(f"freeze: example_inputs[{number}] is a {type(call).__name__}; expected a tuple of "
                                 "arguments or a dict of keyword arguments")
            arguments, keywords = ((), call) if isinstance(call, dict) else (call, {})
            try:
                model(*arguments, **keywords)
            except Exception as error:
                raise ValueError(f"freeze: example_inputs[{number}] is no call of this model: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    for path, largest in found.items():
        if not largest.isfinite().all():
            raise ValueError(f"freeze: example_inputs: {path} was given nan or infinity; expected real calls")
    return found


def smoothing(largest, weight):
    """1 / s [K], of max |x_k| [K] and weight [N,K].

    A channel counts as at least a hundredth of the largest one: one that was quiet in these calls may wake in others.
    """
    most = weight.abs().amax(0)  # [K]
    s = (largest.clamp_min(0.01 * largest.max()) ** ALPHA / most.clamp_min(0.01 * most.max()) ** (1 - ALPHA))
    return torch.where((s > 0) & s.isfinite(), 1 / s, 1)
