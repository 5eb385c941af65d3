"""The shared part of a zip and what each task keeps behind it."""
