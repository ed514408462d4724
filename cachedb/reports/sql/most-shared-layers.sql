-- The layers that the most images use.
-- :limit:count 20
WITH shared AS MATERIALIZED (
    SELECT blob_id FROM image_blobs GROUP BY blob_id HAVING min(image_id) <> max(image_id)
)
SELECT l.digest, l.images, l.size, l.saved_size, l.created_by
FROM shared AS s CROSS JOIN blobs AS b ON b.id = s.blob_id CROSS JOIN shared_layers AS l ON l.digest = b.digest
ORDER BY l.images DESC, l.size DESC LIMIT :limit
