"""Training: perturbations, objectives, the training loop and its schedule."""
