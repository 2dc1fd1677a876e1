"""What must hold before an engine of Gemma 4 is made."""
