"""What is trained: the model, data and loss of each kind of run."""
