"""`python -m onnxmerge` is the command line."""

from onnxmerge.cli import main

main()
