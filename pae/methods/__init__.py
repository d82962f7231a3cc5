"""What is done to prompts once, before or after training; one published method a file."""
