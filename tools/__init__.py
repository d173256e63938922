"""Scripts for developers. Nothing that runs in production imports them."""
