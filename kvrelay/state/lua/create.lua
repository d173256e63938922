#!lua
-- Writes a new request.
-- KEYS: request, owner.  ARGV: gateway_id, create_time_ms, remaining ms, retention ms, then field, value, ...
-- Returns 1 when written, now or by an earlier call; 0 when the id is another's.
local stored = redis.call('HMGET', KEYS[1], 'gateway_id', 'create_time_ms')
if stored[1] then
  return (stored[1] == ARGV[1] and stored[2] == ARGV[2]) and 1 or 0
end
local now = now_ms()
redis.call('HSET', KEYS[1], 'update_time_ms', now, 'redis_deadline_ms', now + tonumber(ARGV[3]), unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[3]) + tonumber(ARGV[4]))
set_owner(KEYS[2], ARGV[1], tonumber(ARGV[3]) + tonumber(ARGV[4]))
return 1
