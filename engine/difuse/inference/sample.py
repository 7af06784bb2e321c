"""Class-conditional images from a trained model."""
import sys
from collections import deque

import torch
from tqdm import tqdm

from difuse.diffusion.grids import part_of
from difuse.diffusion.samplers import Previews, find_sampler, initial_noise


@torch.no_grad()
def sample(model, labels, *, process, prediction, sampler="ddim", steps=50, guidance=1.5, spacing=None, seeds=None,
           batch_size=None, image=None, strength=1.0, mask=None, progress=False, callback=None, graphs=None, **options):
    """One image per label: float32 [N,C,H,W] on the model's device.

    model: as `difuse.models.DiT`, with `config["in_channels"]`, `config["input_size"]` and `num_classes`; it runs in
    eval mode and goes back to the mode it was in. labels: int64 [N] or a list of ints. process, prediction: what it
    was trained with. sampler: a name of `difuse.diffusion.SAMPLERS`; steps, guidance, spacing, image, strength, mask
    and options, clip among them, are its own, see difuse/diffusion/samplers.py. seeds: one integer per image (default
    0, 1, 2, ...); an image depends on its seed and label, not on batch_size. progress shows a bar of steps.
    callback(step, x) is called after every step of every batch. graphs: a `difuse.Graphs`, on a GPU, records each step
    once and replays it: the same images, and the host is free meanwhile. Raises ValueError or TypeError for what does
    not fit.
    """
    method = find_sampler(sampler)
    device = next(model.parameters()).device
    labels = torch.as_tensor(labels, device=device)
    if labels.dim() != 1 or len(labels) == 0:
        raise ValueError(f"sample: labels have shape {tuple(labels.shape)}; expected [N] with N >= 1")
    seeds = range(len(labels)) if seeds is None else list(seeds)
    if len(seeds) != len(labels):
        raise ValueError(f"sample: {len(seeds)} seeds for {len(labels)} labels; give one integer per label")
    batch_size = len(labels) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"sample: batch_size is {batch_size}; expected at least 1")

    shape = (model.config["in_channels"], model.config["input_size"], model.config["input_size"])
    batches = [slice(start, start + batch_size) for start in range(0, len(labels), batch_size)]
    was_training = model.training
    count = steps if isinstance(steps, int) else len(steps)
    count -= part_of(1 - strength, count)
    model.eval()
    try:
        with tqdm(total=count * len(batches), desc=sampler, unit="step", disable=not progress,
                  mininterval=0.1 if sys.stderr.isatty() else 10) as bar:

            done = _Done(bar)

            def after_step(step, x, *x0):
                done.count(x)
                return None if callback is None else callback(step, x, *x0)

            watch = Previews(after_step) if isinstance(callback, Previews) else after_step
            images = []
            for batch in batches:
                noise, generators = initial_noise(shape, seeds[batch], device)
                start = {name: tensor if tensor is None else tensor[batch]
                         for name, tensor in (("image", image), ("mask", mask))}
                images.append(method(
                    model, noise, process=process, steps=steps, prediction=prediction, labels=labels[batch],
                    guidance=guidance, spacing=spacing, generators=generators, strength=strength, graphs=graphs,
                    callback=watch if progress or callback else None, **start, **options))
            done.wait()
    finally:
        model.train(was_training)
    return torch.cat(images)


class _Done:
    """Moves the bar by the steps that are done; on a GPU the host is ahead of them, and must not wait for each."""

    def __init__(self, bar):
        self.bar, self.events = bar, deque()

    def count(self, x):
        """One more step is under way, whose result is x."""
        if not x.is_cuda:
            self.bar.update()
            return
        self.events.append(torch.cuda.current_stream(x.device).record_event())
        while self.events and self.events[0].query():
            self.events.popleft()
            self.bar.update()

    def wait(self):
        """Until the last step is done."""
        for event in self.events:
            event.synchronize()
            self.bar.update()
