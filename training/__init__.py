"""Trains CLIP, priors, decoders and upsamplers on Ray Train."""
