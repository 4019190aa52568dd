"""The controller: starts jobs, follows them, and decides what to do after each has ended."""
