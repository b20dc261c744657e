"""From the words of a command line and a study to a request: Hydra's composition in plain Python."""
