"""One file a format: each turns rows of a data set into samples."""
