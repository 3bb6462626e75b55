"""HTML report for a run, which opens without a network: reading → diagnostics and charts → sections → page."""
