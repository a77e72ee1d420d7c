"""`tako deploy`: what is sent (`release.py` is where to begin), and how it gets there."""
