-- Number of images by the value of a label.
-- :key:label org.opencontainers.image.version
SELECT value, count(*) AS images, min(name) AS name
FROM labels WHERE key = :key GROUP BY value ORDER BY images DESC, value
