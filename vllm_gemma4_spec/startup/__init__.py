"""What the start says before anything is loaded."""
