"""The decode worker: takes over KV caches and continues their sequences one token at a time."""
