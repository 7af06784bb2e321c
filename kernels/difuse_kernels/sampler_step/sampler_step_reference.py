"""sampler_step in plain PyTorch: the specification. Sums in float32 (float64 if any input is), terms in order of j."""
import torch


def sampler_step(inputs, coefficients, out_dtypes):
    """out_i = sum_j coefficients[..., i, j] * inputs[j], cast to out_dtypes[i]; contiguous."""
    work = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    c = coefficients.to(work)
    if c.dim() == 3:  # one set per sample: [B,I,J] -> [I,J,B,1,...], to meet every element of the sample
        c = c.permute(1, 2, 0).reshape(*c.shape[1:], -1, *(1,) * (inputs[0].dim() - 1))
    outputs = []
    for row, dtype in zip(c, out_dtypes, strict=True):
        total = row[0] * inputs[0].to(work)
        for weight, x in zip(row[1:], inputs[1:], strict=True):
            total = total + weight * x.to(work)
        outputs.append(total.to(dtype).contiguous())  # [B,...]
    return tuple(outputs)
