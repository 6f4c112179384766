"""Search: ask, run, tell; plan before, test and audit after."""
