-- The largest layers, each with the command that created it.
-- :limit:count 20
WITH large AS MATERIALIZED (
    SELECT digest FROM blobs WHERE stored_at IS NOT NULL ORDER BY size DESC LIMIT :limit + 10000
), least AS MATERIALIZED (
    -- Nearly all large blobs are layers. Blobs smaller than the first :limit layers cannot be in the result.
    SELECT CASE count(*) WHEN :limit THEN min(size) ELSE 0 END AS size
    FROM (
        SELECT l.size FROM large AS b CROSS JOIN layers AS l ON l.digest = b.digest ORDER BY l.size DESC LIMIT :limit
    )
)
SELECT l.digest, l.size, l.images, l.created_by
FROM least CROSS JOIN layers AS l
WHERE l.stored AND l.size >= least.size ORDER BY l.size DESC, l.digest LIMIT :limit
