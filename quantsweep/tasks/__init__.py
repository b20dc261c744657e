"""lm-eval's tasks as they are defined and loaded: documents, few-shot examples, mistakes in words."""
