#!lua flags=allow-oom
-- Grants or renews a lease, and forgets leases that ended.
-- Allowed without memory: a full Redis must not look like a dead cluster.
-- KEYS: leases (instance id to end of lease), members (instance id to payload), withdrawn.  ARGV: instance id, payload, lease ms.
local now = now_ms()
local lease = tonumber(ARGV[3])
redis.call('ZADD', KEYS[1], now + lease, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
for _, ended in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[1], ended)
  redis.call('HDEL', KEYS[2], ended)
end
redis.call('ZREM', KEYS[3], ARGV[1])
for _, key in ipairs({KEYS[1], KEYS[2]}) do
  redis.call('PEXPIRE', key, lease, 'NX')
  redis.call('PEXPIRE', key, lease, 'GT')
end
return 1
