"""A sweep's folder: paths, whole files, locks, and the records of who is at work in it."""
