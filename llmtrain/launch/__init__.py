"""Jobs of Slurm: what they ask for, the script that they run, handing it over. No torch."""
