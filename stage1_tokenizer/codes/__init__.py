"""The code cache: its format, its writer and its reader."""
