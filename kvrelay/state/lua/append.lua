#!lua
-- Appends frames to a request's log, and skips those it has. Without frames it writes the count only.
-- KEYS: request, log.  ARGV: owner, attempt, position, terminal states, num_output_tokens or '', then frames.
-- Returns {DONE, num_frames}, {GAP, num_frames}, {LOST} or {SUPERSEDED}.
local owner, attempt, position, terminal = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local first = 6
local stored = redis.call('HMGET', KEYS[1], 'gateway_id', 'attempt', 'state')
if not stored[1] then return {'LOST'} end
local stored_attempt = tonumber(stored[2])
if stored_attempt > attempt then return {'SUPERSEDED'} end
if stored_attempt < attempt then return {'LOST'} end
if stored[1] ~= owner then return {'SUPERSEDED'} end

local num_frames = redis.call('XLEN', KEYS[2])
local new_length = position + #ARGV - first + 1
if has(terminal, stored[3]) then
  num_frames = num_frames - 1
  if new_length > num_frames then return {'SUPERSEDED'} end
  return {'DONE', num_frames}
end
if position > num_frames then return {'GAP', num_frames} end
if new_length > num_frames then
  append_frames(KEYS[2], num_frames, position, ARGV, first, #ARGV)
  redis.call('PEXPIRE', KEYS[2], redis.call('PTTL', KEYS[1]))
  num_frames = new_length
end
if ARGV[5] ~= '' then redis.call('HSET', KEYS[1], 'num_output_tokens', ARGV[5]) end
return {'DONE', num_frames}
