"""What the engine costs, beside what the disk and SQLite cost anyway. `python -m benchmarks`; see `__main__.py`."""
