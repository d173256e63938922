#!lua flags=allow-oom
-- Stores what a gateway's keys use, and returns what the other gateways have stored.
-- KEYS: reports (gateway id to 'end of its time' and report).  ARGV: gateway id, report, lifetime ms.
-- Returns {gateway id, report, ...}.
local now = now_ms()
local lifetime = tonumber(ARGV[3])
local others = {}
local stored = redis.call('HGETALL', KEYS[1])
for i = 1, #stored, 2 do
  local ends, report = string.match(stored[i + 1], '^(%d+) (.*)$')
  if not ends or tonumber(ends) <= now then
    redis.call('HDEL', KEYS[1], stored[i])
  elseif stored[i] ~= ARGV[1] then
    others[#others + 1] = stored[i]
    others[#others + 1] = report
  end
end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d ', now + lifetime) .. ARGV[2])
redis.call('PEXPIRE', KEYS[1], lifetime)
return others
