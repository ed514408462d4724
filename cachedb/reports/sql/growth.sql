-- Images and blobs added on each of the last days that are still stored.
-- :days 30
SELECT day, images, blobs, size
FROM growth WHERE julianday('now') - julianday(day) <= :days + 1 ORDER BY day
