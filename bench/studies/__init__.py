"""Studies that answer one question each, from runs of their own; `bench.report` shows five."""
