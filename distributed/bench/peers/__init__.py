"""Other people's training loops on the same work; each module is imported only in the process that measures it."""
