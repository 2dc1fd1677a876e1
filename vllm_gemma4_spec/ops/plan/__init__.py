"""Will it fit, how fast can it be, which k: from two configs, without weights and without a GPU."""
