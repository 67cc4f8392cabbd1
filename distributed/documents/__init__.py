"""Pages of docs/ whose figures a command writes: their blocks, and pieces of Markdown. Imports no torch."""
