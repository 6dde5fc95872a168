"""What makes a run: the command line, the training and evaluation loops, snapshots, metrics and images."""
