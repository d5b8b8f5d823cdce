"""The processes of a run: how they start, share a batch, stop, and notice one that is gone."""
