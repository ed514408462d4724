-- The images with the oldest build dates.
-- :limit:count 20
SELECT name, created, added_at, last_used_at
FROM image_usage ORDER BY coalesce(created, added_at), name LIMIT :limit
