"""The ground floor: command line, files, metrics, Ray; it imports nothing of the project."""
