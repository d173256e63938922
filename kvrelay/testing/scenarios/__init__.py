"""Long scenarios with figures: what docs/reliability.md claims, for everybody to run. `python -m kvrelay.testing kill-matrix`"""
