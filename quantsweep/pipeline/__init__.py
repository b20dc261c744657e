"""A trial as a pipeline of factors: what steps are given, what they give back, and the one order in which they run."""
