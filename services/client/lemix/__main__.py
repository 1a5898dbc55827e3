"""``python -m lemix``: the `lemix` command."""

from lemix.cli.app import main

if __name__ == "__main__":
    main()
