-- The largest layers that one image has and no other.
-- :limit 20
SELECT l.digest, l.size, (SELECT c.name FROM image_contents AS c WHERE c.digest = l.digest) AS name, l.created_by
FROM layers AS l WHERE l.stored AND l.images = 1 ORDER BY l.size DESC, l.digest LIMIT :limit
