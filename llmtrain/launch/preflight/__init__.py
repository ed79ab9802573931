"""What hosts say of themselves before a run, and what is made of it. No torch."""
