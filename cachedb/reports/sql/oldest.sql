-- The images with the oldest build dates.
-- :limit:count 20
SELECT name, created, created_at AS added, last_used_at AS last_used
FROM image_ages ORDER BY coalesce(created, created_at), name LIMIT :limit
