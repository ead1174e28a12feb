"""What `dpnb` does that is more than a call of the library: executing and copying notebooks, and examining an installation."""
