"""HTML pages that inspect a tokenizer (reconstruction errors and code usage) or a prior (likelihoods and copies)."""
