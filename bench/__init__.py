"""Benchmarks: pae beside what a user would run without it, taking turns in one group.

pytest bench/ --benchmark-only              the default subset
pytest bench/ --benchmark-only --full       everything, torch.compile included
pytest bench/ --benchmark-disable           every provider once, at tiny size
"""
