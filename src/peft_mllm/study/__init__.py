"""Studies: from result files to a comparison, as a table and as a page. Imports no torch."""
