-- Images and blobs that were added on each of the last days and are still in the cache.
-- :days:days 30
SELECT day, images, blobs, size
FROM growth WHERE julianday('now') - julianday(day) <= :days + 1 ORDER BY day
