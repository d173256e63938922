"""Sessions with workers, and what the gateway knows of each."""
