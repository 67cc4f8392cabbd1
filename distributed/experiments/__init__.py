"""The seeds' eight results, reproduced."""
