"""Ways to choose workers, one a module. Pure."""
