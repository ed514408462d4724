-- Images whose base has a newer build in the cache, in the same repository and for the same platform.
WITH stacks AS MATERIALIZED (
    -- This query finds the same bases as the view image_bases, but in one pass. It compares the layers of images as
    -- texts of ids. SQLite reads the rows in the order of the primary key, so grouping needs no sort.
    SELECT image_id, count(*) AS layers, group_concat(blob_id) || ',' AS chain,
        max((position << 32) + blob_id) & 0xFFFFFFFF AS top
    FROM image_blobs WHERE role = 'layer' GROUP BY image_id HAVING max(position) - min(position) = count(*) - 1
), tops AS MATERIALIZED (
    SELECT s.image_id, s.layers, s.chain, s.top FROM stacks AS s
    WHERE EXISTS (SELECT 1 FROM image_blobs AS p WHERE p.blob_id = s.top AND p.image_id <> s.image_id)
), bases AS MATERIALIZED (
    -- SQLite takes the other columns from the row with the maximum, which has the most layers, then the smallest id.
    SELECT s.image_id, t.image_id AS base_id, max((t.layers << 32) - t.image_id)
    FROM tops AS t CROSS JOIN image_blobs AS o ON o.blob_id = t.top CROSS JOIN stacks AS s ON s.image_id = o.image_id
    WHERE s.layers > t.layers AND substr(s.chain, 1, length(t.chain)) = t.chain
    GROUP BY s.image_id
), newest AS MATERIALIZED (
    SELECT repository, reference, manifest_id, os, architecture, variant, max(created) AS created
    FROM images WHERE created IS NOT NULL GROUP BY repository, os, architecture, variant
), outdated AS MATERIALIZED (
    SELECT b.id, b.repository || CASE WHEN instr(b.reference, ':') THEN '@' ELSE ':' END || b.reference AS base,
        n.repository || CASE WHEN instr(n.reference, ':') THEN '@' ELSE ':' END || n.reference AS newer,
        b.created AS base_created, n.created AS newer_created, n.manifest_id AS newer_manifest_id
    FROM (SELECT DISTINCT base_id FROM bases) AS d
    CROSS JOIN images AS b ON b.id = d.base_id
    JOIN newest AS n ON n.repository = b.repository
        AND n.os IS b.os AND n.architecture IS b.architecture AND n.variant IS b.variant
    WHERE n.created > b.created
)
SELECT i.repository || CASE WHEN instr(i.reference, ':') THEN '@' ELSE ':' END || i.reference AS name,
    o.base, o.newer, o.base_created, o.newer_created
FROM bases AS s CROSS JOIN outdated AS o ON o.id = s.base_id CROSS JOIN images AS i ON i.id = s.image_id
WHERE i.manifest_id <> o.newer_manifest_id -- the newer build itself may be based on the older one
ORDER BY o.base, name
