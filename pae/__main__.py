"""``python -m pae``: the command line, for launchers that start modules."""

from pae.train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
