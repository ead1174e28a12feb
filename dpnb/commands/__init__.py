"""What `dpnb` does that is more than a call of the library: executing notebooks, and examining an installation."""
