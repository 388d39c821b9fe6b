"""From image files to packed patches and grids."""
