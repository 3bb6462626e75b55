"""One HTML page of a run that opens without a network: reading → verdicts and charts → sections → page."""
