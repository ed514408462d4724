-- Blobs of one image that another image does not have.
-- :name
-- :over
SELECT role, digest, size, created_by
FROM image_contents
WHERE name IN (:name, :name || ':latest')
    AND digest NOT IN (SELECT digest FROM image_contents WHERE name IN (:over, :over || ':latest'))
ORDER BY position
