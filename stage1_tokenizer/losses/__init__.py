"""What a tokenizer minimises."""
