"""The SQL: tables, statements, schema."""
