-- The largest repositories, by the total size of their images.
-- :limit:count 20
WITH largest AS MATERIALIZED (
    SELECT repository, size FROM repository_usage ORDER BY size DESC, repository LIMIT :limit
)
SELECT u.repository, u.images, u.size, u.unique_size
FROM largest AS l CROSS JOIN repository_usage AS u ON u.repository = l.repository
ORDER BY l.size DESC, l.repository
