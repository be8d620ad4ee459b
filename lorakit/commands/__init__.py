"""What each command does: calls the rooms below, and shows or prints what they answer."""
