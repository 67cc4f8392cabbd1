"""One page on one run or several, for somebody who was not there."""
