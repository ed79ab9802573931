"""Which of several equal documents stays."""
