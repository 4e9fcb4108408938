"""Whether ``staleness.budget: auto`` is as good as the best budget that could have been written down."""
