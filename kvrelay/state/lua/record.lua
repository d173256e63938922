#!lua flags=no-writes
-- Reads a request's record at one moment.
-- KEYS: request.
-- Returns {the time in milliseconds, {field, value, ...}}.
return {now_ms(), redis.call('HGETALL', KEYS[1])}
