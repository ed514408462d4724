-- The least recently used images, neither pinned nor held, that free a number of bytes; each row adds to those before.
-- :size:size
WITH marked AS (
    SELECT i.id, i.last_used_at,
        i.pinned_at IS NOT NULL OR m.digest IN (SELECT digest FROM leases) AS is_kept
    FROM images AS i CROSS JOIN blobs AS m ON m.id = i.manifest_id
), ranked AS MATERIALIZED (
    -- What is kept comes last, so no other image frees its blobs.
    SELECT id, is_kept, row_number() OVER (ORDER BY is_kept, last_used_at, id) AS place FROM marked
), deaths AS (
    -- Removal frees a blob with the last of the images that have it.
    SELECT o.blob_id, max(r.place) AS place
    FROM image_blobs AS o CROSS JOIN ranked AS r ON r.id = o.image_id
    GROUP BY o.blob_id
), freed AS MATERIALIZED (
    SELECT d.place, sum(b.size) AS size
    FROM deaths AS d CROSS JOIN blobs AS b ON b.id = d.blob_id
    WHERE b.stored_at IS NOT NULL
        AND b.id NOT IN (SELECT h.id FROM leases AS l CROSS JOIN blobs AS h ON h.digest = l.digest)
    GROUP BY d.place
), running AS (
    SELECT r.id, r.is_kept, r.place, coalesce(f.size, 0) AS size, sum(coalesce(f.size, 0)) OVER (ORDER BY r.place) AS total
    FROM ranked AS r LEFT JOIN freed AS f ON f.place = r.place
)
SELECT
    i.repository || CASE WHEN instr(i.reference, ':') THEN '@' ELSE ':' END || i.reference AS name,
    i.last_used_at,
    r.size AS freed_size,
    r.total AS total_freed_size
FROM running AS r CROSS JOIN images AS i ON i.id = r.id
WHERE NOT r.is_kept AND r.total - r.size < :size
ORDER BY r.place
