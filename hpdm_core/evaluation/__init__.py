"""The evaluator of folders: two sets of clips, one protocol, one number that says how it was made.

``sources`` finds the videos, ``selection`` chooses clips by the protocol's rule, ``reading`` decodes and
prepares them, ``extraction`` turns them into features on one or many processes, ``scores`` makes the number
with its uncertainty, ``results`` writes and compares; ``run`` puts them together, ``command`` is the command
line. Not here: networks and distances (`hpdm_core.metrics`).
"""
