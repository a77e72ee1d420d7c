"""The `tako` command. `app.py` is where to begin; one file per command in `commands/`."""
