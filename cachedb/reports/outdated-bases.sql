-- Images on a base of which the cache has one that was built later, in the same repository and for the same platform.
WITH newest AS (
    SELECT repository, reference, os, architecture, variant, max(created) AS created
    FROM images WHERE created IS NOT NULL GROUP BY repository, os, architecture, variant
)
SELECT i.name, i.base, n.repository || ':' || n.reference AS newer, b.created AS base_created, n.created AS newer_created
FROM image_bases AS i
CROSS JOIN blobs AS m ON m.digest = i.base_digest
CROSS JOIN images AS b ON b.manifest_id = m.id
    AND b.repository || CASE WHEN instr(b.reference, ':') THEN '@' ELSE ':' END || b.reference = i.base
JOIN newest AS n ON n.repository = b.repository
    AND n.os IS b.os AND n.architecture IS b.architecture AND n.variant IS b.variant
WHERE n.created > b.created
ORDER BY i.base, i.name
