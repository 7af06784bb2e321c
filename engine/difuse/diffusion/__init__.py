"""Diffusion: processes (data to noise), parameterizations (what the network predicts), samplers (noise to data).

    process = VP("linear")                            # or VP("cosine"), Flow()
    alpha, sigma = process.alpha_sigma(t)             # float64, shaped like t
    x_t = diffuse(x0, noise, alpha, sigma)            # alpha*x0 + sigma*noise
    y = target("eps", x0, noise, alpha, sigma)        # what the network should say
    x0 = ddim(model, noise, process=process, steps=50, labels=labels, guidance=1.5, prediction="eps")
"""
from difuse.diffusion.parameterizations import PREDICTIONS, coefficients, convert, diffuse, target
from difuse.diffusion.processes import VP, Flow, process_from_config
from difuse.diffusion.samplers import SAMPLERS, ddim, ddpm, flow_euler, initial_noise

__all__ = [
    "PREDICTIONS", "SAMPLERS", "VP", "Flow", "coefficients", "convert", "ddim", "ddpm", "diffuse", "flow_euler",
    "initial_noise", "process_from_config", "target",
]
