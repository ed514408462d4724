-- The largest images.
-- :limit:count 20
WITH largest AS MATERIALIZED (
    SELECT repository, reference, size FROM image_usage ORDER BY size DESC, name LIMIT :limit
)
SELECT u.name, u.size, u.unique_size, u.shared_size, u.last_used_at
FROM largest AS l CROSS JOIN image_usage AS u ON u.repository = l.repository AND u.reference = l.reference
ORDER BY u.size DESC, u.name
