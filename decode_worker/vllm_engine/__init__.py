"""VllmEngine on a decode worker."""
