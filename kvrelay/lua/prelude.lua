-- Prepended to every script by kvrelay/redis_connection.py.

-- Redis's clock in milliseconds. Clocks of gateways and workers decide nothing here.
local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- Whether a list such as ',A,B,' has an item.
local function has(list, item)
  return string.find(list, ',' .. item .. ',', 1, true) ~= nil
end

-- Frame p of a log has the stream id (p + 1)-0, since a stream has no id 0-0. An ended log has one entry more, with field 'end'.
local function append_frames(log, num_frames, position, frames, first, last)
  for i = first + num_frames - position, last do
    redis.call('XADD', log, (position + i - first + 1) .. '-0', 'frame', frames[i])
  end
end

-- Wakes those who follow the log, once.
local function end_log(log, num_frames)
  redis.call('XADD', log, (num_frames + 1) .. '-0', 'end', '')
end
