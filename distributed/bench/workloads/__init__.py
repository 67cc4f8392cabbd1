"""Functions that a benchmark runs, each in its own process: `function(clock, **settings)` works until `clock.tick()`."""
