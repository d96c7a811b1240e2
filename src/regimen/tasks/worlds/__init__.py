"""Small built-in worlds that the papers' default experiments run on."""
