"""The plan made real: samples fetched, decoded, altered and collated, ahead of their use."""
