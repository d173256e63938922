#!lua flags=allow-oom
-- Frees an idempotency key if this request has it.
-- KEYS: key.  ARGV: request id.
if redis.call('HGET', KEYS[1], 'request_id') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
