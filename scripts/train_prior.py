"""Entry point for `accelerate launch scripts/train_prior.py --codes … --output …`: the command train-prior."""

import sys

from latentloom.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-prior", *sys.argv[1:]]))
