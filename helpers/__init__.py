"""What the notebooks share. Each module can be read, and tested, without the others."""
