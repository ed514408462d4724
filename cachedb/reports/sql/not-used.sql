-- Images not used for a number of days that nothing pins or holds, longest first.
-- :days:days 30
SELECT name, round(unused_days, 1) AS unused_days, last_used_at
FROM image_usage WHERE unused_days >= :days AND NOT pinned AND digest NOT IN (SELECT digest FROM leases)
ORDER BY unused_days DESC, name
