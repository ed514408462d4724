-- The layers that most images have.
-- :limit 20
SELECT digest, images, size, saved_size, created_by
FROM shared_layers ORDER BY images DESC, size DESC LIMIT :limit
