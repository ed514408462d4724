-- Manifests that have several names.
SELECT digest, count(*) AS images, group_concat(name, ' ') AS names
FROM image_usage GROUP BY digest HAVING count(*) > 1 ORDER BY images DESC, digest
