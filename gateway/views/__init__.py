"""Shows the whole cluster: its members, and figures for the live page."""
