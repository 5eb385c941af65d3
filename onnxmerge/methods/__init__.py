"""The four jobs, each a readable recipe made of passes."""
