"""How ranks meet, exchange tensors and notice that one of them is gone."""
