"""A flow-matching model where a sampler expects VP or VE: the paths are the same lines at other scales and times."""
import torch
from torch import nn


class FlowAsVP(nn.Module):
    """`model` (velocity, as `Flow` trains it) seen as a network that predicts x0 on the VP `process`.

    Divided by alpha + sigma, x_t = alpha*x0 + sigma*noise lies on the straight path at time sigma / (alpha + sigma);
    the velocity there gives x0. So ddim and ddpm run on a flow-trained model, with their own spacing of noise levels:

        sample(FlowAsVP(model, process), labels, process=process, prediction="x0", sampler="ddim")
    """

    def __init__(self, model, process):
        super().__init__()
        self.model, self.process = model, process
        self.config, self.num_classes = model.config, model.num_classes
        self.training = model.training

    def levels(self, t):
        """(alpha, sigma) at what the process gives its networks for time: [B] float64."""
        return self.process.alpha_sigma(t)

    def forward(self, x, t, y):
        """x [B,C,H,W], t [B] int64 of the VP process, y [B] -> x0 [B,C,H,W] in x's dtype."""
        alpha, sigma = self.levels(t)                                                     # [B] float64
        flow_time = (sigma / (alpha + sigma)).to(x.dtype)                                 # [B]
        x_flow = x * (1 / (alpha + sigma)).to(x.dtype).reshape(-1, 1, 1, 1)               # [B,C,H,W]
        velocity = self.model(x_flow, 1000 * flow_time, y)[:, : x.shape[1]]               # [B,C,H,W]
        return x_flow - flow_time.reshape(-1, 1, 1, 1) * velocity                         # [B,C,H,W]


class FlowAsVE(FlowAsVP):
    """The same on the VE `process`, alpha = 1, whose networks are given sigma itself as time."""

    def levels(self, t):
        """(1, sigma)."""
        return torch.ones_like(t, dtype=torch.float64), t.double()
