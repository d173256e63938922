"""Long scenarios that give the figures of docs/reference/reliability.md."""
