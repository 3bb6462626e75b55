"""Run `python -m latentloom VERB`, or `accelerate launch -m latentloom VERB` for several processes."""

import sys

from latentloom.cli import main

sys.exit(main())
