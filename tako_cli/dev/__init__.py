"""`tako dev`: the project's workers and their log. `session.py` is where to begin."""
