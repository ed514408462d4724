-- Images that the cache has for a platform; without a variant, for all its variants.
-- :platform:platform
SELECT name, variant, digest, size, complete
FROM platforms
WHERE :platform IN (os || '/' || architecture, os || '/' || architecture || '/' || variant)
ORDER BY size DESC, name
