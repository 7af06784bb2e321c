"""Running trained models. `difuse.sample` is `difuse.inference.sample.sample`."""
