"""Blobs and images kept in step, on disk and in the index."""
