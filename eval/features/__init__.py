"""Features of images by published networks or a CLIP."""
