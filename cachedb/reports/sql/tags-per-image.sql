-- Number of tags, and of the images that they point to, by repository.
-- :limit:count 20
SELECT repository, count(*) AS tags, count(DISTINCT manifest_id) AS images
FROM images WHERE instr(reference, ':') = 0 GROUP BY repository ORDER BY tags DESC, repository LIMIT :limit
