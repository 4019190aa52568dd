"""The evaluator: measures a folder of videos against another one by a protocol, or the metrics of a trained cell.

``sources`` finds the videos, ``selection`` chooses clips by the protocol's rule, ``reading`` decodes and prepares them,
``extraction`` computes features on one or many processes, ``scores`` computes the number with its uncertainty,
``results`` writes and compares results; ``run`` connects these, ``command`` is the command line. Networks and distances
are in `hpdm_core.metrics`.
"""
