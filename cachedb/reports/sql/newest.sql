-- The most recently added images.
-- :limit:count 20
SELECT name, created_at AS added, created
FROM image_ages ORDER BY created_at DESC, name LIMIT :limit
