"""sampler_step in plain PyTorch: the specification. Sums in float32 (float64 if any input is), terms in order of j.

The noise is a counter-based stream: what a sample's element gets depends on its seed, its step and its place alone.
Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a key of two 32-bit words and a
counter of four into four random words r0..r3. The key is the seed (low word, high word); the counter of elements
4g .. 4g+3, counted in the contiguous sample, is (g low, g high, step low, step high). By Box and Muller (1958)

    u = float32(r0) * 2^-32 + 2^-33,  v = float32(r1) * 2^-32       float32 rounds to nearest; u in (0,1]
    z(4g) = sqrt(-2 ln u) cos(2 pi v),  z(4g+1) = sqrt(-2 ln u) sin(2 pi v)

and r2, r3 give z(4g+2) and z(4g+3) alike.
"""
from math import pi

import torch

_WORD = 0xFFFFFFFF


def philox(counter, key):
    """The four words of Philox4x32-10. counter: four, key: two tensors, int64 with 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64-bit products; the sign bit is a bit like any other
        c0, c1, c2, c3 = b >> 32 & _WORD ^ c1 ^ k0, b & _WORD, a >> 32 & _WORD ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def normals(noise, shape, work):
    """Standard normal values of `shape` [B,...] from noise [B,2], (seed, step) of each sample, in dtype `work`."""
    count = shape[1:].numel()
    group = torch.arange((count + 3) // 4, device=noise.device)
    seed, step = noise[:, :1], noise[:, 1:]
    counter = torch.broadcast_tensors(group & _WORD, group >> 32, step & _WORD, step >> 32 & _WORD)
    words = philox(counter, (seed & _WORD, seed >> 32 & _WORD))  # four of [B,count/4]
    r0, r1, r2, r3 = (word.float() * 2.0**-32 for word in words)
    u, v = torch.stack((r0, r2), -1) + 2.0**-33, torch.stack((r1, r3), -1)
    radius, angle = (-2 * u.to(work).log()).sqrt(), 2 * pi * v.to(work)
    z = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)  # [B,count/4,2,2]
    return z.reshape(shape[0], 4 * len(group))[:, :count].reshape(shape)


def sampler_step(inputs, coefficients, noise, out_dtypes):
    """out_i = sum_j coefficients[..., i, j] * inputs[j], cast to out_dtypes[i]; contiguous. Noise is the last input."""
    work = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    if noise is not None:
        inputs = (*inputs, normals(noise, inputs[0].shape, work))
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
