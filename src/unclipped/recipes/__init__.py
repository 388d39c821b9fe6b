"""YAML recipes: schema, inheritance, overrides, built-in recipes."""
