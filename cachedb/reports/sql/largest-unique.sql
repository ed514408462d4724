-- The images with the most unique bytes.
-- :limit:count 20
WITH largest AS MATERIALIZED (
    SELECT one.image_id, sum(b.size) AS unique_size
    FROM (
        SELECT blob_id, min(image_id) AS image_id FROM image_blobs GROUP BY blob_id HAVING min(image_id) = max(image_id)
    ) AS one
    CROSS JOIN blobs AS b ON b.id = one.blob_id AND b.stored_at IS NOT NULL
    GROUP BY one.image_id ORDER BY unique_size DESC LIMIT :limit
)
SELECT u.name, u.unique_size, u.size, u.freed_size
FROM largest AS l
CROSS JOIN images AS i ON i.id = l.image_id
CROSS JOIN image_usage AS u ON u.repository = i.repository AND u.reference = i.reference
ORDER BY u.unique_size DESC, u.name
