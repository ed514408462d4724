"""The code that is specific to SQLite: connections, transactions, queries, errors and backups."""
