"""The machine a program runs on: flags, processes, mesh, files, memory and terminal."""
