"""Training: data in memory, objectives, the loop, averaged weights, checkpoints that survive being killed.

    data = ImageDataset.digits("train")
    config = TrainConfig(model={"patch_size": 2, "hidden_size": 128, "depth": 6, "num_heads": 4}, steps=1000)
    trainer = Trainer(build_model(config, data), data, config, out_dir="runs/digits")
    trainer.train()                                                  # run it again to continue where it stopped
    model, meta = load_model(latest_checkpoint("runs/digits"))       # the averaged weights
"""
from difuse.training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    read_meta,
    save_checkpoint,
)
from difuse.training.config import TrainConfig, build_model
from difuse.training.data import ImageDataset, load_dataset
from difuse.training.ema import EMA
from difuse.training.trainer import Trainer, read_metrics

__all__ = [
    "CheckpointError", "EMA", "ImageDataset", "TrainConfig", "Trainer", "build_model", "latest_checkpoint",
    "load_checkpoint", "load_dataset", "load_model", "read_meta", "read_metrics", "save_checkpoint",
]
