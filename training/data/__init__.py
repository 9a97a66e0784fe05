"""Data sets, samplers and loaders of a training run."""
