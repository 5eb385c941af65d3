"""Rewrites, one in each file: model(s) in, model out."""
