"""The work behind the commands: each stage alone, both stages together, and the files that they write."""
