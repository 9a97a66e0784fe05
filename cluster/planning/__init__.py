"""The arithmetic of plans: machines, memory and hours of a run."""
