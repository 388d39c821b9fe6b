"""Tasks, scorers, intervals and the runner."""
