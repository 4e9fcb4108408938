"""The broker: admission within the staleness budget, groups, advantages, rejection, packing and receipts. No torch here."""
