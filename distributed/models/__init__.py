"""The networks. They know no ranks: what depends on them is done to a model from outside."""
