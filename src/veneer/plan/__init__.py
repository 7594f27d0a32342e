"""What a run will cost before it runs, and which method to choose."""
