"""Engines that sample: embedded (local) ones here, servers behind the same protocol."""
