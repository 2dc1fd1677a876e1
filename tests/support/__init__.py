"""What several test folders share: tiny models, engine runs in processes of their own."""
