"""Plan a run before it begins: select recipes, time a step, estimate the memory."""
