-- Manifests that have several names.
SELECT digest, count(*) AS names, group_concat(name, ' ') AS all_names
FROM image_usage GROUP BY digest HAVING count(*) > 1 ORDER BY names DESC, digest
