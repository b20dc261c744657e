"""Scoring a loaded model on lm-eval tasks."""
