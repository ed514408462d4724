-- What only one of two images has: blobs, labels, and values of its config.
-- :name:image
-- :other:image
WITH both AS (
    SELECT name, os, architecture, variant, author, created FROM image_usage WHERE name IN (:name, :other)
), parts AS (
    SELECT name, position AS place, role AS part, digest, size, created_by AS detail
    FROM image_contents WHERE name IN (:name, :other)
    UNION ALL
    SELECT name, NULL, 'label', NULL, NULL, key || '=' || value FROM labels WHERE name IN (:name, :other)
    UNION ALL SELECT name, NULL, 'os', NULL, NULL, os FROM both WHERE os IS NOT NULL
    UNION ALL SELECT name, NULL, 'architecture', NULL, NULL, architecture FROM both WHERE architecture IS NOT NULL
    UNION ALL SELECT name, NULL, 'variant', NULL, NULL, variant FROM both WHERE variant IS NOT NULL
    UNION ALL SELECT name, NULL, 'author', NULL, NULL, author FROM both WHERE author IS NOT NULL
    UNION ALL SELECT name, NULL, 'created', NULL, NULL, created FROM both WHERE created IS NOT NULL
)
SELECT p.name, p.part, p.digest, p.size, p.detail
FROM parts AS p
WHERE NOT EXISTS (
    SELECT 1 FROM parts AS o
    WHERE o.name <> p.name AND o.part = p.part AND o.digest IS p.digest AND (p.digest IS NOT NULL OR o.detail = p.detail)
)
ORDER BY p.place IS NULL, p.name <> :name, p.place, p.part, p.detail
