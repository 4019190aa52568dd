"""Video clips: the interfaces of datasets and readers, and code that datasets share.

Not here: the datasets themselves (each is a plugin) and training batches (`hpdm_core.training.batches`).
"""
