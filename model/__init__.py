"""How tokens become tokens. The only package that imports torch."""
