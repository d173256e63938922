#!lua flags=allow-oom
-- Ends a lease, and says so for a while: a lease that only vanished may have been lost by Redis.
-- KEYS: leases, members, withdrawn (instance id to when).  ARGV: instance id, how long it is said in ms.
local now = now_ms()
local time_to_live = tonumber(ARGV[2])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[3], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - time_to_live)
redis.call('PEXPIRE', KEYS[3], time_to_live)
return 1
