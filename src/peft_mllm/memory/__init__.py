"""How much memory a step of training takes, and how it is computed so that it fits."""
