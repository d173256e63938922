"""Records what happened: metrics, timelines and traces."""
