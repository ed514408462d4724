-- Usage of the images with each value of a label, each blob counted once; images without the label come last.
-- :key:label
WITH labelled AS MATERIALIZED (
    SELECT i.id, l.value, dense_rank() OVER (ORDER BY l.value) AS place
    FROM images AS i LEFT JOIN image_labels AS l ON l.image_id = i.id AND l.key = :key
), owned AS MATERIALIZED (
    SELECT o.blob_id, min(l.place) AS first, max(l.place) AS last
    FROM image_blobs AS o CROSS JOIN labelled AS l ON l.id = o.image_id
    GROUP BY o.blob_id
), held AS MATERIALIZED (
    SELECT b.id FROM leases AS l CROSS JOIN blobs AS b ON b.digest = l.digest
), members AS (
    -- Most blobs belong to one value. Only the others need a search for all their values.
    SELECT blob_id, first AS place, 0 AS shared FROM owned WHERE first = last
    UNION ALL
    SELECT DISTINCT o.blob_id, l.place, 1
    FROM owned AS w CROSS JOIN image_blobs AS o ON o.blob_id = w.blob_id CROSS JOIN labelled AS l ON l.id = o.image_id
    WHERE w.first <> w.last
), sums AS (
    SELECT
        m.place,
        count(*) AS blobs,
        sum(b.size) AS size,
        sum(b.size) FILTER (WHERE b.stored_at IS NULL) AS missing_size,
        sum(b.size) FILTER (WHERE b.stored_at IS NOT NULL AND NOT m.shared) AS unique_size,
        sum(b.size) FILTER (WHERE b.stored_at IS NOT NULL AND m.shared) AS shared_size,
        sum(b.size) FILTER (WHERE b.stored_at IS NOT NULL AND NOT m.shared AND b.id NOT IN (SELECT id FROM held))
            AS freed_size
    FROM members AS m CROSS JOIN blobs AS b ON b.id = m.blob_id
    GROUP BY m.place
)
SELECT
    n.value,
    n.images,
    s.blobs,
    s.size,
    coalesce(s.missing_size, 0) AS missing_size,
    coalesce(s.unique_size, 0) AS unique_size,
    coalesce(s.shared_size, 0) AS shared_size,
    coalesce(s.freed_size, 0) AS freed_size
FROM (SELECT place, value, count(*) AS images FROM labelled GROUP BY place) AS n CROSS JOIN sums AS s ON s.place = n.place
ORDER BY n.value IS NULL, s.size DESC, n.value
