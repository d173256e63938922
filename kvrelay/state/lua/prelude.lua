-- Prepended to every script by kvrelay/state/redis_connection.py.

-- Redis's clock in milliseconds. Clocks of gateways and workers decide nothing here.
local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Says whose a request is, beside it: workers may read that and no more.
local function set_owner(key, gateway_id, time_to_live)
  redis.call('HSET', key, 'gateway_id', gateway_id)
  redis.call('PEXPIRE', key, time_to_live)
end

-- Whether a list such as ',A,B,' has an item.
local function has(list, item)
  return string.find(list, ',' .. item .. ',', 1, true) ~= nil
end

-- Frame p of a log has the stream id (p + 1)-0, because a stream has no id 0-0.
-- An ended log has one more entry, with field 'end'.
local function append_frames(log, num_frames, position, frames, first, last)
  for i = first + num_frames - position, last do
    redis.call('XADD', log, (position + i - first + 1) .. '-0', 'frame', frames[i])
  end
end

-- Wakes readers that follow the log, once.
local function end_log(log, num_frames)
  redis.call('XADD', log, (num_frames + 1) .. '-0', 'end', '')
end

-- How long the log of an ended request is kept: for readers that are behind, or for readers to come.
local function log_retention(request, retention, follow)
  if redis.call('HGET', request, 'keeps_output') ~= '0' then return retention end
  return math.min(tonumber(retention), tonumber(follow))
end
