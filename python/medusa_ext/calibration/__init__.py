"""What Medusa heads are worth on a machine: accuracies, step times, and the tree that follows."""
