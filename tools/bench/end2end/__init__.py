"""What asynchrony is worth: the same training run synchronously, asynchronously and by TRL."""
