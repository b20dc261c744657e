"""One trial: what it is (specs), which model and task it means (identity), what a method and a data type can do (registry, constraints)."""
