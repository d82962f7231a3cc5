"""What a user would run instead of pae, one file per piece: plain PyTorch that uses nothing of
this repository, so that benchmarks can time against it and tests can check against it.
"""
