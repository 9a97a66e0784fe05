"""Captions to images: settings, jobs, edits and image sources."""
