"""What failed, alike or not: the taxonomy, fingerprints, and the group an entry belongs to."""
