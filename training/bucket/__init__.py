"""Runs whose folder is a bucket: a copy on each node, what keeps the two alike, and a lease."""
