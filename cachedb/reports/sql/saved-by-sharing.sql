-- Size of all stored blobs, and the bytes saved because images share layers.
WITH shared AS MATERIALIZED (
    SELECT blob_id FROM image_blobs GROUP BY blob_id HAVING min(image_id) <> max(image_id)
)
SELECT
    (SELECT coalesce(sum(size), 0) FROM blobs WHERE stored_at IS NOT NULL) AS size,
    count(*) AS shared_layers,
    coalesce(sum(l.saved_size), 0) AS saved_size
FROM shared AS s CROSS JOIN blobs AS b ON b.id = s.blob_id CROSS JOIN shared_layers AS l ON l.digest = b.digest
