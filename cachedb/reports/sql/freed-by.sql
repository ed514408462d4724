-- Bytes freed by removing these images together; a name may be a pattern such as team/*.
-- :names:images
WITH chosen AS (
    SELECT id FROM images
    WHERE repository || CASE WHEN instr(reference, ':') THEN '@' ELSE ':' END || reference
        IN (SELECT value FROM json_each(:names))
)
SELECT count(*) AS blobs, coalesce(sum(size), 0) AS size, (SELECT count(*) FROM chosen) AS images
FROM blobs AS b
WHERE b.stored_at IS NOT NULL
    AND b.id IN (SELECT blob_id FROM image_blobs WHERE image_id IN (SELECT id FROM chosen))
    AND NOT EXISTS (SELECT 1 FROM image_blobs AS o WHERE o.blob_id = b.id AND o.image_id NOT IN (SELECT id FROM chosen))
    AND NOT EXISTS (SELECT 1 FROM leases AS l WHERE l.digest = b.digest)
