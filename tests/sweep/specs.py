"""Specs for tests: a tiny backbone on shades, on a CPU; and a way to slow a run down."""

from __future__ import annotations

import json

OPTIONS = """
[options]
model = "test_vit"
pretrained = false
img_size = 32
epochs = {epochs}
batch_size = 16
num_tokens = 2
device = "cpu"
amp = "no"
workers = 1
"""

# as sitecustomize.py: every epoch takes half a second more, of sleep
SLOW = """
import importlib.abc, sys
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "pae.train.loop":
            sys.meta_path.remove(self)
            from pae.train import loop
            import time
            finish = loop._Run._finish_epoch
            loop._Run._finish_epoch = lambda run: (finish(run), time.sleep(0.5))
sys.meta_path.insert(0, Slow())
"""


def write_spec(path, folder, top='methods = ["vpt-deep"]', below="", epochs=2):
    """Writes a spec over the images in `folder`, unless it names tasks; returns its path."""
    tasks = "" if "tasks" in top + below else f"tasks = [{json.dumps(str(folder))}]"
    path.write_text("\n".join([top, tasks, OPTIONS.format(epochs=epochs), below]))
    return path
