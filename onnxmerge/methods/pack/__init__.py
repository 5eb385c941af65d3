"""Lossless sharing of what is equal."""
