"""Networks of the tokenizers."""
