"""What the specifications say: names, digests, manifests, configs. Reads no file."""
