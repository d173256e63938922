"""Settings: declarations and sources."""
