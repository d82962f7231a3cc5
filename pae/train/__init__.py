"""The main job: real images, a frozen backbone, a training run that survives being killed.

``pae train`` on the command line; `pae.train.loop.train` from Python. Nothing here is imported by
``import pae``.
"""
