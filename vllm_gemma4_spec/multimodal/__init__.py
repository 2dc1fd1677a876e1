"""Image, video and audio inputs of Gemma 4 targets."""
