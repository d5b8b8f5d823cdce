"""Paraphrases of captions by a language model or by rules, over several processes."""
