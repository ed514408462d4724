"""Read and write images in archives, registries and index.json caches, without an index."""
