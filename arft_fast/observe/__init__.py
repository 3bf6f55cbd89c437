"""What a run leaves behind: its folder, its figures, its pictures, its lines on the console."""
