"""`python -m gpt2cli` and the `gpt2` script."""

from gpt2cli.commands.app import main

if __name__ == "__main__":
    main()
