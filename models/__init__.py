"""What is learned: networks, training, evaluation, checkpoints and Monte Carlo dropout. No HTTP."""
