"""A data set of real images, and a classifier for its metrics."""
