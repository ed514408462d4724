"""Talk to registries, following the OCI distribution specification."""
