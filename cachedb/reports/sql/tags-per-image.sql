-- Number of tags, and of the manifests that they point to, by repository.
-- :limit:count 20
SELECT repository, count(*) AS tags, count(DISTINCT manifest_id) AS manifests
FROM images WHERE instr(reference, ':') = 0 GROUP BY repository ORDER BY tags DESC, repository LIMIT :limit
