#!lua flags=allow-oom
-- Lists a request. A list lives as long as its longest-lived request.
-- KEYS: lists, all in one slot of a cluster.  ARGV: create_time_ms, request id, time to live ms.
for _, list in ipairs(KEYS) do
  redis.call('ZADD', list, ARGV[1], ARGV[2])
  redis.call('PEXPIRE', list, ARGV[3], 'NX')
  redis.call('PEXPIRE', list, ARGV[3], 'GT')
end
return 1
