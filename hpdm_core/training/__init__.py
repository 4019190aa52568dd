"""Training: the training loop (`trainer`) and its parts."""

from hpdm_core.training.trainer import Trainer, load_ema_model

__all__ = ["Trainer", "load_ema_model"]
