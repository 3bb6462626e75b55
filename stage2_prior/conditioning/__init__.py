"""Conditioning of priors."""
