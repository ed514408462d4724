-- Incomplete images and their missing blobs.
SELECT name, role, digest, size
FROM missing_blobs ORDER BY name, position
