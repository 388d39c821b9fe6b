"""`python -m unclipped` is the same as the command `unclipped`."""

from unclipped.cli.main import main

if __name__ == "__main__":
    main()
