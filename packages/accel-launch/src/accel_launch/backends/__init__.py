"""Ways to start what is planned, one file each."""
