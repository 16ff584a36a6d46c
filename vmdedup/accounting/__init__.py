"""Reports, listings and checks of what is shared, by the kernel's word. Reads only."""
