"""How the learner's ranks work together."""
