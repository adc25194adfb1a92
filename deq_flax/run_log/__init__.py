"""The log of a run: files in its workdir, lines on the terminal, pictures."""
