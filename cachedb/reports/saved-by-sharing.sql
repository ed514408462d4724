-- What all images would take if they shared no layers, and what sharing saves.
SELECT
    (SELECT coalesce(sum(size), 0) FROM blobs WHERE stored_at IS NOT NULL) AS size,
    (SELECT count(*) FROM shared_layers) AS shared_layers,
    (SELECT coalesce(sum(saved_size), 0) FROM shared_layers) AS saved_size
