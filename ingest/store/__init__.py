"""Committed shards on any storage: commits, snapshots, removal, workers."""
