"""A tokenizer looked at closely: what it loses, which codes it uses and what they look like, as one HTML page."""
