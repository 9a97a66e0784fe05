"""Samples from trained models, scores the samples and reports them."""
