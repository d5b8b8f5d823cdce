"""Readers of data formats: each yields rows of an image and its captions, and rejects with a reason."""
