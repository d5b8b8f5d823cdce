"""What a model is worth on data: retrieval, zero-shot classification, paraphrased queries."""
