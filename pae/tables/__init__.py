"""From finished runs to a table: means and intervals over seeds, in Markdown, CSV or LaTeX."""
