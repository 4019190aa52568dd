"""Clips of real and made video: what a dataset and a reader promise, and the parts that datasets share.

Not here: the datasets themselves (each is a plugin) and the batches that training makes of clips.
"""
