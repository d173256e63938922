"""The `kvrelay serve` commands."""
