"""What people do with a cache, one module a verb."""
