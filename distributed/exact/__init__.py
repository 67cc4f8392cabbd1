"""The same bits on any number of processes: a fixed number of shards, each computed alike anywhere, sums in one tree."""
