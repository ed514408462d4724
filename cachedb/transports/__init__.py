"""Where images come from and go to: archives, registries, an index.json cache. Knows no index."""
