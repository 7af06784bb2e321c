"""The smallest things that can be trained; shared by the tests and by the processes they kill."""
import torch

from difuse.models import DiT
from difuse.training import ImageDataset, TrainConfig, Trainer

CLASSES = 3


def tiny_data(count=20, seed=0):
    """Random images [count,1,4,4] of three classes; 20 is no multiple of the batch size, so batches cross epochs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 4, 4, generator=generator) * 2 - 1
    return ImageDataset.from_arrays(images, torch.arange(count) % CLASSES, ["a", "b", "c"])


def tiny_model(seed=0, dropout=0.5, **changes):
    """A DiT of width 16 and depth 1 with no weight left at zero; labels are dropped often, so that it is noticed."""
    settings = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2,
                "num_classes": CLASSES, "class_dropout_prob": dropout} | changes
    model = DiT(**settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_config(**changes):
    """Six steps of eight images, a checkpoint every second step, every step logged."""
    return TrainConfig(**{"steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 3, "checkpoint_every": 2,
                          "log_every": 1, "seed": 5, "ema_decay": 0.9} | changes)


def tiny_trainer(out_dir=None, **changes):
    """A trainer made of the three above."""
    return Trainer(tiny_model(), tiny_data(), tiny_config(**changes), out_dir, progress=False)
