"""The broker: admission within the staleness budget, groups, advantages, rejection, packing, receipts. No torch."""
