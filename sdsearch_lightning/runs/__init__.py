"""What a run leaves on disk, and what is told of it: its folder, its metrics, the card of its model."""
