"""The head of a cluster that outlives its processes: its state is in Redis."""
