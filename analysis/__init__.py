"""From the results table to tables and figures: pure functions of a DataFrame, and a small command over them."""
