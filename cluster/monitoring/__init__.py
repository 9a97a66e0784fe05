"""What is watched: panels, recording rules, and the queries of the watch page."""
