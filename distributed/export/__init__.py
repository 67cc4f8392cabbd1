"""A trained network in formats that run without this code, each reloaded and compared before it is called done."""
