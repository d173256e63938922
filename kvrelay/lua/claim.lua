#!lua
-- Makes an idempotency key stand for a request, unless it stands for one already.
-- KEYS: key.  ARGV: body digest, request id, time to live ms.
-- Returns {body digest, request id} that the key stands for now.
local stored = redis.call('HMGET', KEYS[1], 'body_digest', 'request_id')
if stored[1] then return stored end
redis.call('HSET', KEYS[1], 'body_digest', ARGV[1], 'request_id', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {ARGV[1], ARGV[2]}
