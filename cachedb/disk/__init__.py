"""The cache directory: files, locks, durable writes. Knows no SQL."""
