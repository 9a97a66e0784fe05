"""Weights from and to other libraries' pipelines."""
