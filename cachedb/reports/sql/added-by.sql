-- Blobs of one image that another image does not have.
-- :name:image
-- :over:image
SELECT role, digest, size, created_by
FROM image_contents
WHERE name = :name AND digest NOT IN (SELECT digest FROM image_contents WHERE name = :over)
ORDER BY position
