"""What came of a merge: the result's schema, tables, plots, the HTML page, and where it all came from."""
