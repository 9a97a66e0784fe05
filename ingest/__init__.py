"""From a list of URLs to committed shards of images and embeddings."""
