"""Images: sources, decoding, and conversion to tensors."""
