"""``python -m moesaic VERB``: the same command line, for torchrun and for uninstalled checkouts."""

from moesaic.cli.main import main

if __name__ == "__main__":
    main()
