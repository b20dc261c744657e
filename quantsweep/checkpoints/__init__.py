"""A model's files: what they say of themselves, their pinned revisions, and that they are still those that were planned."""
