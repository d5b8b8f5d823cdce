"""Small helpers without knowledge of models or data sets: files, randomness, errors, HTML, figures."""
