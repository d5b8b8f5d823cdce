"""A trained model in the formats of other libraries, each compared with the model before it is kept."""
