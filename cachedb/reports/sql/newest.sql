-- The most recently added images.
-- :limit:count 20
SELECT name, added_at, created
FROM image_usage ORDER BY added_at DESC, name LIMIT :limit
