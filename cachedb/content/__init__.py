"""Blobs and images, kept consistent on disk and in the index."""
