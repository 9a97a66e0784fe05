"""URL lists: reading, splitting into shards, filters."""
