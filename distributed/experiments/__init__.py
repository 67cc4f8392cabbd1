"""The experiments behind every accuracy in the documents: references, recipes and ablations."""
