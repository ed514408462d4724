"""Registries, by the OCI distribution specification."""
