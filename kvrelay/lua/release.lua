#!lua flags=allow-oom
-- Forgets an idempotency key if it stands for this request.
-- KEYS: key.  ARGV: request id.
if redis.call('HGET', KEYS[1], 'request_id') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
