"""Everything between 'ranks exist' and 'run over'."""
