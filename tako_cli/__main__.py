"""`python -m tako_cli` is `tako`."""

from tako_cli.app import main

if __name__ == "__main__":
    main()
