#!lua flags=allow-oom
-- Gives an active request of a dead gateway to another: attempt + 1, QUEUED.
-- KEYS: request, owner.  ARGV: expected owner, expected attempt, new owner, token of this call, terminal states.
-- Returns 1 when done, now or by an earlier send of this call; 0 when the request is not as expected.
local stored = redis.call('HMGET', KEYS[1], 'gateway_id', 'attempt', 'state', 'takeover')
if not stored[1] then return 0 end
if stored[4] == ARGV[4] then return 1 end
if stored[1] ~= ARGV[1] or stored[2] ~= ARGV[2] or has(ARGV[5], stored[3]) then return 0 end
redis.call('HSET', KEYS[1], 'gateway_id', ARGV[3], 'attempt', tonumber(ARGV[2]) + 1, 'state', 'QUEUED', 'takeover', ARGV[4],
  'prefill_worker_id', '', 'decode_worker_id', '', 'update_time_ms', now_ms())
set_owner(KEYS[2], ARGV[3], redis.call('PTTL', KEYS[1]))
return 1
