#!lua
-- Rewrites a request from its owner's memory after Redis lost a part.
-- KEYS: request, log, owner.
-- ARGV: owner, attempt, state, remaining ms, retention ms, terminal states, position of the first frame, follow ms,
--   number of fields and values, field, value, ..., then frames.
-- Returns DONE; SUPERSEDED when Redis knows better; LOST when frames before the position are missing.
local owner, attempt, state, remaining, retention, terminal = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local position = tonumber(ARGV[7])
local last_field = 9 + tonumber(ARGV[9])
local stored = redis.call('HMGET', KEYS[1], 'gateway_id', 'attempt', 'state')
if stored[1] then
  local stored_attempt = tonumber(stored[2])
  local same = stored_attempt == attempt and stored[1] == owner
  if has(terminal, stored[3]) then return (same and stored[3] == state) and 'DONE' or 'SUPERSEDED' end
  if stored_attempt > attempt or (stored_attempt == attempt and not same) then return 'SUPERSEDED' end
else
  -- A log without its request may have ended; ARGV has its frames too.
  redis.call('DEL', KEYS[2])
end

local num_frames = redis.call('XLEN', KEYS[2])
if position > num_frames then return 'LOST' end
local now = now_ms()
redis.call('HSET', KEYS[1], 'update_time_ms', now, 'redis_deadline_ms', now + tonumber(remaining), unpack(ARGV, 10, last_field))
append_frames(KEYS[2], num_frames, position, ARGV, last_field + 1, #ARGV)
local time_to_live, log_time_to_live = tonumber(retention), nil
if has(terminal, state) then
  end_log(KEYS[2], math.max(num_frames, position + #ARGV - last_field))
  log_time_to_live = log_retention(KEYS[1], retention, ARGV[8])
else
  time_to_live = time_to_live + tonumber(remaining)
end
redis.call('PEXPIRE', KEYS[1], time_to_live)
set_owner(KEYS[3], owner, time_to_live)
redis.call('PEXPIRE', KEYS[2], log_time_to_live or time_to_live)
return 'DONE'
