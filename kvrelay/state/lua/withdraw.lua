#!lua flags=allow-oom
-- Ends a lease, and remembers it for a while: Redis may have lost a lease that only vanished.
-- KEYS: leases, members, withdrawn (instance id to when).  ARGV: instance id, how long to remember in ms.
local now = now_ms()
local time_to_live = tonumber(ARGV[2])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[3], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - time_to_live)
redis.call('PEXPIRE', KEYS[3], time_to_live)
return 1
