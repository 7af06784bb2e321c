"""Diffusion: processes (data to noise), parameterizations (what the network predicts), samplers (noise to data).

    process = VP("linear")                            # or Flow(), VPSDE(), SubVPSDE(), VESDE(), EDM()
    alpha, sigma = process.alpha_sigma(t)             # float64, shaped like t
    x_t = diffuse(x0, noise, alpha, sigma)            # alpha*x0 + sigma*noise
    y = target("eps", x0, noise, alpha, sigma)        # what the network should say
    x0 = ddim(model, noise, process=process, steps=50, labels=labels, guidance=1.5, prediction="eps")
    x0 = SAMPLERS["unipc"](model, noise, process=process, steps=10, prediction="eps", spacing="log_snr", order=3)
"""
from difuse.diffusion.clipping import Clamp, Threshold
from difuse.diffusion.control import invert, probability_flow, slerp
from difuse.diffusion.grids import SPACINGS, path
from difuse.diffusion.guidance import APG, Guidance, skip_layers
from difuse.diffusion.parameterizations import PREDICTIONS, coefficients, convert, diffuse, target
from difuse.diffusion.processes import EDM, VESDE, VP, VPSDE, Flow, SubVPSDE, process_from_config
from difuse.diffusion.samplers import SAMPLERS, Previews, Sampler, ddim, ddpm, flow_euler, initial_noise

__all__ = [
    "APG", "EDM", "PREDICTIONS", "SAMPLERS", "SPACINGS", "VESDE", "VP", "VPSDE", "Clamp", "Flow", "Guidance",
    "Previews", "Sampler", "SubVPSDE", "Threshold", "coefficients", "convert", "ddim", "ddpm", "diffuse", "flow_euler",
    "initial_noise", "invert", "path", "probability_flow", "process_from_config", "skip_layers", "slerp", "target",
]
