"""The transformer in plain torch. It knows no ranks."""
