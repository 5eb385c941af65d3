"""gate: networks of one task and architecture become one of the same size, put together from their best channels."""
