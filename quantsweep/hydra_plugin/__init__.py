"""The only package that knows Hydra: composing configurations, and Hydra's sweeper and launcher."""
