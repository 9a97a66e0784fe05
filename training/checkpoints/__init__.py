"""Writes, verifies and loads checkpoints."""
