"""`latentloom sweep`: search over the settings of one stage."""
