"""``python -m moesaic COMMAND``: the command line, for torchrun and uninstalled checkouts."""

from moesaic.cli.main import main

if __name__ == "__main__":
    main()
