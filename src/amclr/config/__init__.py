"""Settings of a run and named sets of them. Imports no torch, so that `--help` is quick."""
