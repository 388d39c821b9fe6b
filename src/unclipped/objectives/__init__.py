"""Training objectives: modules whose forward returns a loss and its parts."""
