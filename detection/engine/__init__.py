"""Training and evaluation loops, the processes they run in, and the folder they write."""
