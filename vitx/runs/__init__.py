"""What a run of training left behind, read and played back."""
