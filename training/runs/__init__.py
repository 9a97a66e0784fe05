"""A run from its launch to its end: folder, records, watchdog, validation."""
