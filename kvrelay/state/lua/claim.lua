#!lua
-- Claims an idempotency key for a request, unless another request has it.
-- KEYS: key.  ARGV: body digest, request id, time to live ms.
-- Returns the key's {body digest, request id}.
local stored = redis.call('HMGET', KEYS[1], 'body_digest', 'request_id')
if stored[1] then return stored end
redis.call('HSET', KEYS[1], 'body_digest', ARGV[1], 'request_id', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {ARGV[1], ARGV[2]}
