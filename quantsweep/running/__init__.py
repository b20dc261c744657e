"""One worker at work: its child process, its heartbeat, how it stops."""
