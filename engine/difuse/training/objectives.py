"""Training objectives and timestep distributions, as their papers write them.

Every path is x_t = alpha_t * x0 + sigma_t * noise. Losses are plain means of squared errors, each sample weighing the
same, computed in float32 whatever the network computes in.

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models"                       eps_loss
    Lipman et al. 2022, "Flow Matching for Generative Modeling"; Liu et al. 2022,
    "Flow Straight and Fast"                                                         flow_loss
    Esser et al. 2024, "Scaling Rectified Flow Transformers" (SD3), section 3.1      logit_normal
"""
import torch
import torch.nn.functional as F

from difuse.diffusion import diffuse


def eps_loss(model, process, x0, y, t, noise):
    """L_simple of Ho et al. 2020 (algorithm 1, equation 14): || noise - model(x_t, t, y) ||^2.

    x0, noise [B,C,H,W] float32, y [B] int64, t [B] as `process` takes it. Returns a float32 scalar.
    """
    return _mean_squared_error(_predict(model, process, x0, y, t, noise), noise)


def flow_loss(model, process, x0, y, t, noise):
    """Conditional flow matching on the straight path (Lipman et al. 2022, equation 23; Liu et al. 2022, equation 1).

    x_t = (1 - t) x0 + t noise moves with velocity dx_t/dt = noise - x0: || (noise - x0) - model(x_t, t, y) ||^2.
    Shapes as in `eps_loss`.
    """
    return _mean_squared_error(_predict(model, process, x0, y, t, noise), noise - x0)


LOSSES = {"eps": eps_loss, "flow": flow_loss}


def _predict(model, process, x0, y, t, noise):
    x_t = diffuse(x0, noise, *process.alpha_sigma(t))  # [B,C,H,W]
    output = model(x_t, process.model_time(t), y)  # [B,C,H,W]
    if output.shape != x0.shape:
        raise ValueError(f"training: the model returned {tuple(output.shape)} for images {tuple(x0.shape)}; expected "
                         "the images' shape. A DiT is trained with learn_sigma=False")
    return output


def _mean_squared_error(prediction, target):
    return F.mse_loss(prediction.float(), target.float())


def uniform(count, generator):
    """`count` float64 values, uniform in [0, 1), on the generator's device."""
    return torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)


def logit_normal(count, generator, mean=0.0, std=1.0):
    """`count` float64 values in [0, 1] whose logit is normal: most of them at middle noise levels (SD3)."""
    normal = torch.randn(count, dtype=torch.float64, generator=generator, device=generator.device)
    return torch.sigmoid(mean + std * normal)


def draw_times(config, process, count, generator):
    """[count] times drawn as `config` says: int64 in [0, num_steps) for a process in steps, float32 for the flow."""
    if config.timesteps == "uniform":
        u = uniform(count, generator)
    else:
        u = logit_normal(count, generator, config.logit_mean, config.logit_std)
    if process.name == "flow":
        return u.float()
    return (u * process.num_steps).long().clamp_(max=process.num_steps - 1)
