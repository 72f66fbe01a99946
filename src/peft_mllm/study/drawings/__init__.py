"""A study's figures: each a function of its analysis that draws with matplotlib, for the page and as files."""
