"""`latentloom sweep`: a search over one stage's settings."""
