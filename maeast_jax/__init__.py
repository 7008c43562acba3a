"""MAE-AST (Baade, Peng, Harwath 2022) in JAX: a deep encoder sees only the unmasked tokens."""
