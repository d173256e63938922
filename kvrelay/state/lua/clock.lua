#!lua flags=no-writes
-- KEYS: any, whose server is asked.
-- Returns the time in milliseconds.
return now_ms()
