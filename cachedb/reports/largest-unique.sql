-- The images with the most bytes that no other image has.
-- :limit 20
SELECT name, unique_size, size, freed_size
FROM image_usage ORDER BY unique_size DESC, name LIMIT :limit
