"""The command line: one file for each command. Heavy libraries are imported inside commands, so `--help` is quick."""

from onnxmerge.cli.app import main

__all__ = ["main"]
