"""Captions: text views, stored paraphrases, and what English rewording may change."""
