#!lua flags=allow-oom
-- Shares one secret among gateways: the first one's, as long as any gateway renews it.
-- KEYS: secret.  ARGV: the caller's secret, time to live ms.
-- Returns the secret.
local stored = redis.call('HGET', KEYS[1], 'secret')
if not stored then
  stored = ARGV[1]
  redis.call('HSET', KEYS[1], 'secret', stored)
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return stored
