"""Entry point for `accelerate launch scripts/train_tokenizer.py --data … --output …`: the command train-tokenizer."""

import sys

from latentloom.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-tokenizer", *sys.argv[1:]]))
