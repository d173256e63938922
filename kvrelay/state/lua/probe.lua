#!lua flags=allow-oom
-- Runs all commands of the other scripts on keys of its own: do they work now? Leaves nothing.
-- KEYS: hash, log, list, all in one slot of a cluster.
-- Returns the time in milliseconds.
local now = now_ms()
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
redis.call('HSET', KEYS[1], 'field', 'value')
redis.call('HMGET', KEYS[1], 'field')
redis.call('HGET', KEYS[1], 'field')
redis.call('HGETALL', KEYS[1])
redis.call('HDEL', KEYS[1], 'other')
redis.call('XADD', KEYS[2], '1-0', 'frame', '')
redis.call('XLEN', KEYS[2])
redis.call('XRANGE', KEYS[2], '1-0', '1-0')
redis.call('ZADD', KEYS[3], 1, 'member')
redis.call('ZRANGE', KEYS[3], 0, -1)
redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', 0)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', 0)
redis.call('ZREM', KEYS[3], 'other')
redis.call('PEXPIRE', KEYS[1], 1000)
redis.call('PTTL', KEYS[1])
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
return now
