"""Networks, training, evaluation, checkpoints and Monte Carlo dropout. No HTTP."""
