"""PNG grids and the loss curve. Pillow and matplotlib are optional and imported when a picture is made."""
import io
import math

import torch

from difuse.files import require_extras, write_atomically


def image_grid(images, columns=None, *, scale=1, gap=2):
    """Images side by side on a mid-grey sheet, row by row.

    images [N,C,H,W], float in [-1,1] (values outside are clipped), C 1 or 3; `columns` per row (default: about a
    square); every pixel is drawn as scale x scale pixels; `gap` pixels between images. Returns uint8 [H',W',C].
    Raises ValueError for other shapes, for values that are not finite and for sizes below one.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"image_grid: got shape {tuple(images.shape)}; expected [N,1,H,W] or [N,3,H,W] with N > 0")
    if not images.isfinite().all():
        raise ValueError("image_grid: the images hold NaN or infinity; the model or its training went wrong")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1 or scale < 1 or gap < 0:
        raise ValueError(f"image_grid: columns {columns}, scale {scale}, gap {gap}; expected at least 1, 1 and 0")
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.permute(0, 2, 3, 1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)   # [N,h,w,C]
    count, height, width, channels = pixels.shape
    rows = math.ceil(count / columns)
    sheet = torch.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 128, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet                                                                                  # [H',W',C]


def save_png(path, pixels):
    """Write uint8 pixels [H,W,1] or [H,W,3] as a PNG; an existing file is replaced in one step or stays whole."""
    require_extras("writing PNG files", "PIL")
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy()).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def plot_loss(path, steps, losses, *, title="training loss"):
    """Draw the loss of each step, and its running mean, as a PNG at `path`; steps and losses are equally long."""
    require_extras("drawing the loss", "matplotlib")
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    if len(steps) != len(losses) or not len(steps):
        raise ValueError(f"plot_loss: {len(steps)} steps and {len(losses)} losses; expected as many, and some")
    window = max(1, len(losses) // 50)
    smooth = torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(-1)
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss", yscale="log")
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} steps")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
