"""Ways to start a run on a cluster; each calls the same `distributed.recipe.train`."""
