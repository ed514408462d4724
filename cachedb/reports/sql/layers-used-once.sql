-- The largest layers that only one image uses.
-- :limit:count 20
WITH large AS MATERIALIZED (
    SELECT digest FROM blobs WHERE stored_at IS NOT NULL ORDER BY size DESC LIMIT :limit + 10000
), least AS MATERIALIZED (
    -- As in largest-layers: blobs smaller than the first :limit layers cannot be in the result.
    SELECT CASE count(*) WHEN :limit THEN min(size) ELSE 0 END AS size
    FROM (
        SELECT l.size FROM large AS b CROSS JOIN layers AS l ON l.digest = b.digest
        WHERE l.images = 1 ORDER BY l.size DESC LIMIT :limit
    )
)
SELECT l.digest, l.size, (SELECT c.name FROM image_contents AS c WHERE c.digest = l.digest) AS name, l.created_by
FROM least CROSS JOIN layers AS l
WHERE l.stored AND l.images = 1 AND l.size >= least.size ORDER BY l.size DESC, l.digest LIMIT :limit
