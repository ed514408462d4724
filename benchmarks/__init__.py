"""Compare cachedb with its peers and with the limits of the machine: `python -m benchmarks`."""
