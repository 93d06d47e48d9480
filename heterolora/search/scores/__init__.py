"""What a module or shortcut promises, measured before it is trained."""
