-- The largest images.
-- :limit 20
SELECT name, size, unique_size, shared_size, last_used_at
FROM image_usage ORDER BY size DESC, name LIMIT :limit
