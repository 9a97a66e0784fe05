"""Encodes committed image shards by a frozen CLIP."""
