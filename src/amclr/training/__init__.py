"""A training run: assembly, the loop, its state, and the faults that it survives."""
