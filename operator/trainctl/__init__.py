"""The command line. ``main`` holds the commands; each command's work is in a module that only it imports."""
