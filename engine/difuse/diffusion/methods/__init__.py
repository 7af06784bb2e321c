"""Samplers as their papers write them; `difuse.diffusion.samplers` runs them."""
