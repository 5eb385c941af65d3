"""Two small networks and their data, so that the demo runs offline (see ATTRIBUTION.md)."""
