-- The largest layers, and the command that made each.
-- :limit 20
SELECT digest, size, images, created_by
FROM layers WHERE stored ORDER BY size DESC, digest LIMIT :limit
