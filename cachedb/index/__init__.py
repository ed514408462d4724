"""The index of a cache in SQL: tables, statements, schema."""
