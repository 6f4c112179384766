"""Decide what to train, run it, and keep the record; `python -m study` is the command line."""
