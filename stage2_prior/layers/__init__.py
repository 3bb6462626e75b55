"""Layers that several priors share."""
