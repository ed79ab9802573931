"""Process grid and groups. It knows no particular model."""
