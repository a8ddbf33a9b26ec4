"""A small long-tail world, written in the formats of the published data sets."""
