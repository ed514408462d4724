-- What came on each of the last days, and is still here.
-- :days 30
SELECT day, images, blobs, size
FROM growth WHERE julianday('now') - julianday(day) <= :days + 1 ORDER BY day
