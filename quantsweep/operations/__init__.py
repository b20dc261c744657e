"""What people do besides launching: status texts, forecasts, doctor, prewarm, the launches of a sweep."""
