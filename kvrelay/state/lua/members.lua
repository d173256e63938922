#!lua flags=no-writes
-- Returns {payloads of members with a lease, instance ids that withdrew lately}.
-- KEYS: leases, members, withdrawn.
local alive = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now_ms(), '+inf')
local payloads = {}
for _, instance_id in ipairs(alive) do
  local payload = redis.call('HGET', KEYS[2], instance_id)
  if payload then payloads[#payloads + 1] = payload end
end
return {payloads, redis.call('ZRANGE', KEYS[3], 0, -1)}
