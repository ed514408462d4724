"""Image archives: tars, folders and streams, read and written."""
