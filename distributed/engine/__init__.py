"""How a model is distributed over the ranks: one protocol, one engine per file."""
