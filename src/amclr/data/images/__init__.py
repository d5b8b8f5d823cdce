"""Images: decoding and keeping them, views, batched edits, near-duplicates."""
