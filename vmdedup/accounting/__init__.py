"""What is shared, from the kernel's word: reports, listings and checks. Reads only."""
