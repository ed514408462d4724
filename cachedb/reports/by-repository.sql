-- Repositories by the bytes that their images take together.
-- :limit 20
SELECT repository, images, size, unique_size
FROM repository_usage ORDER BY size DESC, repository LIMIT :limit
