"""The decode worker's pure scheduler."""
