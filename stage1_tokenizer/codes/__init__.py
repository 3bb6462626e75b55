"""The code cache: one format, its writer and its reader."""
