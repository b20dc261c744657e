"""Documents behind calibration and perplexities: read, cut into tokens, compared."""
