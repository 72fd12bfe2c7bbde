"""Runs the command line as ``python -m kmerge_mlx``."""

from kmerge_mlx.cli import main

if __name__ == "__main__":
    main()
