"""Shared weights under separate streams of activations: zip's second mode."""
