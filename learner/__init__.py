"""The learner: a mixture-of-experts decoder, its losses and optimizer, its policy replica and its weight publisher."""
