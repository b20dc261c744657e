"""What becomes of failures: classes, retries, the breaker, holds, bad nodes."""
