"""A study's report: one HTML page, with tables and figures beside it as files."""
