"""Data: sources become a manifest, and batches are a function of (seed, step)."""
