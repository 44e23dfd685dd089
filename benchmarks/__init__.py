"""What is timed, and against whom; README.md has the commands."""
