-- Repositories by the number of their tags, and of the images that those point to.
-- :limit 20
SELECT repository, count(*) AS tags, count(DISTINCT manifest_id) AS images
FROM images WHERE instr(reference, ':') = 0 GROUP BY repository ORDER BY tags DESC, repository LIMIT :limit
