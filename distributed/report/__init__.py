"""A single HTML page on one run or several, for readers who were not there."""
