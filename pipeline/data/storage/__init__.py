"""Files of any storage that fsspec knows: publishing, locks, trying again, local copies."""
