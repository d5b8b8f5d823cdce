"""Run folders: configuration, metrics, checkpoints, loggers, and the models that they hold."""
