"""How a model is spread over the ranks: one protocol, an engine a file."""
