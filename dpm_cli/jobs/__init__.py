"""What each command does, as a function: none of them prints."""
