"""What is minimised: scores of labelled text, and rewards of generated text."""
