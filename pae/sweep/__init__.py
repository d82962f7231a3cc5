"""Many runs of `pae train` from one file: grids, draws, seeds, tasks, methods; see docs/sweeps.md.

`read_spec` reads the file, `Plan` says which runs it wants, a `Records` holds what came out, and an
executor does nothing but start what has no record. `read` is for whoever makes a table of it.
"""
