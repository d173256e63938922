#!lua flags=allow-oom
-- Lists a request. The list lives as long as its longest-lived request.
-- KEYS: list.  ARGV: create_time_ms, request id, time to live ms.
redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3], 'NX')
redis.call('PEXPIRE', KEYS[1], ARGV[3], 'GT')
return 1
