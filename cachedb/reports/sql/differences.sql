-- What only one of two images has: blobs, platforms, labels, author, and time of its build.
-- :name:image
-- :other:image
WITH parts AS (
    SELECT name, position AS place, role AS part, digest, size, created_by AS detail
    FROM image_contents WHERE name IN (:name, :other)
    UNION ALL
    SELECT name, NULL, 'platform', NULL, NULL, os || '/' || architecture || coalesce('/' || variant, '')
    FROM platforms WHERE name IN (:name, :other)
    UNION ALL
    SELECT name, NULL, 'label', NULL, NULL, key || '=' || value FROM labels WHERE name IN (:name, :other)
    UNION ALL
    SELECT name, NULL, 'author', NULL, NULL, author FROM image_usage WHERE name IN (:name, :other)
    UNION ALL
    SELECT name, NULL, 'created', NULL, NULL, created FROM image_usage WHERE name IN (:name, :other)
)
SELECT p.name, p.part, p.digest, p.size, p.detail
FROM parts AS p
WHERE (p.digest IS NOT NULL OR p.detail IS NOT NULL) AND NOT EXISTS (
    SELECT 1 FROM parts AS o
    WHERE o.name <> p.name AND o.part = p.part AND o.digest IS p.digest AND (p.digest IS NOT NULL OR o.detail = p.detail)
)
ORDER BY p.place IS NULL, p.name <> :name, p.place, p.part, p.detail
