"""Scores of images, embeddings and drawn captions."""
