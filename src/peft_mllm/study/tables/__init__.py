"""A study's tables: their rows and columns, and how they are written as Markdown, LaTeX, CSV and for a terminal."""
