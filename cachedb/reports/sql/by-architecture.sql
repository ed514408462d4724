-- Number of images by platform.
SELECT os, architecture, variant, count(*) AS images
FROM images GROUP BY os, architecture, variant ORDER BY images DESC
