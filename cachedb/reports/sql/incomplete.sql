-- Images that lack a blob, and what they lack.
SELECT name, role, digest, size
FROM missing_blobs ORDER BY name, position
