"""Training: data, tasks with known answers, losses, optimizers and the loop."""
