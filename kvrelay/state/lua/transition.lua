#!lua flags=allow-oom
-- Moves a request along an edge. Allowed without memory, so that requests can end.
-- KEYS: request, log.
-- ARGV: owner, attempt, to state, new attempt, retention ms, edges, paths, terminal states, follow ms, then field, value, ...
-- Returns DONE; SUPERSEDED when the caller is a zombie; LOST when Redis knows less than the caller.
local owner, attempt, to_state, new_attempt = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local edges, paths, terminal = ARGV[6], ARGV[7], ARGV[8]
local stored = redis.call('HMGET', KEYS[1], 'gateway_id', 'attempt', 'state')
if not stored[1] then return 'LOST' end
local stored_owner, stored_attempt, state = stored[1], tonumber(stored[2]), stored[3]

if stored_owner == owner and stored_attempt == new_attempt and state == to_state then return 'DONE' end
if has(terminal, state) or stored_attempt > attempt then return 'SUPERSEDED' end
if stored_attempt < attempt then return 'LOST' end
if stored_owner ~= owner then return 'SUPERSEDED' end
if new_attempt == attempt then
  local move = state .. '>' .. to_state
  if not has(edges, move) then return has(paths, move) and 'LOST' or 'SUPERSEDED' end
elseif new_attempt ~= attempt + 1 or to_state ~= 'QUEUED' then
  return 'SUPERSEDED'
end

redis.call('HSET', KEYS[1], 'state', to_state, 'attempt', new_attempt, 'update_time_ms', now_ms(), unpack(ARGV, 10))
if has(terminal, to_state) then
  end_log(KEYS[2], redis.call('XLEN', KEYS[2]))
  redis.call('PEXPIRE', KEYS[1], ARGV[5])
  redis.call('PEXPIRE', KEYS[2], log_retention(KEYS[1], ARGV[5], ARGV[9]))
end
return 'DONE'
