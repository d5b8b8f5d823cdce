"""Many runs of an experiment file, alike in all but what they differ in, tested against each other."""
