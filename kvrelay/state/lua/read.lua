#!lua flags=no-writes
-- Reads frames and state at one moment.
-- KEYS: request, log.  ARGV: position, max_count, terminal states.
-- Returns {state, frame, ...}, or {} without the request. Only the last frames have a terminal state.
local position, max_count, terminal = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return {} end
local num_frames = redis.call('XLEN', KEYS[2])
local ended = has(terminal, state)
if ended and num_frames > 0 then num_frames = num_frames - 1 end

local answer = {state}
local last = math.min(num_frames, position + max_count)
if last > position then
  local entries = redis.call('XRANGE', KEYS[2], (position + 1) .. '-0', last .. '-0')
  for _, entry in ipairs(entries) do answer[#answer + 1] = entry[2][2] end
end
if ended and last < num_frames then answer[1] = 'DECODING' end
return answer
