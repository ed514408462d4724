"""Everything that only SQLite has: connections, transactions, queries, errors and backups."""
