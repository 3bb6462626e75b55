"""What a prior is conditioned on."""
