"""Loading language models and reaching into their decoder blocks."""
