"""What the package carries: a real data set and its classifier."""
