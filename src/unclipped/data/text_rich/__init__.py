"""Which images hold much readable text: a small detector of letters, its training, and the filter that uses it."""
