-- Blobs that `cachedb gc` would free.
SELECT digest, size, stored_at FROM garbage ORDER BY size DESC, digest
