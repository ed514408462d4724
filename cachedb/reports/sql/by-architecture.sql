-- Number of images for each platform; an image for several platforms counts for each of them.
SELECT os, architecture, variant, count(DISTINCT name) AS images
FROM platforms GROUP BY os, architecture, variant
UNION ALL
SELECT NULL, NULL, NULL, count(*) -- whose platform is unknown, because their config is missing or says nothing
FROM images WHERE id NOT IN (SELECT image_id FROM image_platforms) HAVING count(*) > 0
ORDER BY images DESC, os, architecture, variant
