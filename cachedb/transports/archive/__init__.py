"""Read and write image archives: tars, folders and streams."""
