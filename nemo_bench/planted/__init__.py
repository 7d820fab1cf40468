"""The embedded model: a small diffusion model with planted memorization, its world and its training."""
