"""Fetches, decodes and writes images, within each host's limits."""
