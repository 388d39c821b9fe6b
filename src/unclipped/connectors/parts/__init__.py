"""Parts of connectors, a file for each idea; a new file is found by itself."""
