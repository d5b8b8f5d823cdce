"""Dual encoders: towers, projections, tokenizers, frozen features, weight averaging, folders and the Hub."""
